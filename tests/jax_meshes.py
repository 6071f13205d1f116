"""What the programs on eight devices have in common: arrays, and what XLA made of a function."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Facts = dict[str, Any]

COLLECTIVE = re.compile(
    r"= (\S+|\(.*?\)) "
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def mesh(x: int = 4, y: int = 2, kind: AxisType = AxisType.Auto) -> Any:
    """All eight devices in two axes; with two processes, ``x`` leads from one to the other."""
    return jax.make_mesh((x, y), ("x", "y"), (kind, kind))


def sharded(
    devices: Any, spec: PartitionSpec, shape: tuple[int, ...], dtype: str = "float32"
) -> Any:
    """Random numbers, the same in all processes, each of which makes its own part."""
    numbers = np.random.default_rng(0).normal(size=shape).astype(jax.numpy.dtype(dtype))
    sharding = NamedSharding(devices, spec)
    return jax.make_array_from_callback(shape, sharding, lambda index: numbers[index])


def whole(devices: Any, tree: Any) -> Any:
    """The numbers of all devices, in float64."""
    everywhere = NamedSharding(devices, PartitionSpec())
    gathered = jax.jit(lambda arrays: arrays, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda array: np.asarray(array).astype("float64"), gathered)


def collectives(compiled: Any) -> Counter[str]:
    """What a program communicates: kinds and numbers of elements."""
    found: Counter[str] = Counter()
    for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
        for shape in re.findall(r"\[([\d,]*)\]", shapes):
            found[f"{kind} {np.prod([int(n) for n in shape.split(',') if n], dtype=int)}"] += 1
    return found


def write_facts(cases: Mapping[str, Callable[[], Facts]]) -> None:
    """Run the cases in this process, one of those that `devices.seen_by` starts."""
    report, port, processes, process = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    names = sys.argv[5:] or list(cases)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    facts = {name: cases[name]() for name in names}
    if process == 0:
        report.write_text(json.dumps(facts), encoding="utf-8")
