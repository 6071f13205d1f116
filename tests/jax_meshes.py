"""Programs on eight devices, for which a CPU stands: their start, arrays and collectives."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

N_DEVICES = 8
SECONDS = 150  # before processes that wait for each other are ended

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
    if jax.process_count() > 1:  # of which each has a part
        everywhere = NamedSharding(devices, PartitionSpec())
        tree = jax.jit(lambda arrays: arrays, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda array: np.asarray(array).astype("float64"), tree)


def collectives(compiled: Any) -> Counter[str]:
    """What a program communicates: kinds and numbers of elements."""
    found: Counter[str] = Counter()
    for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
        for shape in re.findall(r"\[([\d,]*)\]", shapes):
            found[f"{kind} {np.prod([int(n) for n in shape.split(',') if n], dtype=int)}"] += 1
    return found


def write_facts(cases: Mapping[str, Callable[[], Facts]]) -> None:
    """Run the cases in this process, one of those that `seen_by` starts."""
    report, port, processes, process = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    names = sys.argv[5:] or list(cases)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    facts = {name: cases[name]() for name in names}
    if process == 0:
        report.write_text(json.dumps(facts), encoding="utf-8")


def seen_by(program: str, *cases: str, processes: int = 1) -> Any:
    """Run cases of a program of this folder, or all; return the JSON of the first process."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={N_DEVICES // processes}",
    }
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        path = Path(__file__).parent / program
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])  # which is free
        command = [sys.executable, str(path), str(report), port, str(processes)]
        started = [
            subprocess.Popen(
                [*command, str(k), *cases],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for k in range(processes)
        ]
        try:
            ends = [(process.communicate(timeout=SECONDS)[1], process) for process in started]
        finally:
            for process in started:
                process.kill()
        for stderr, process in ends:
            assert process.returncode == 0, stderr.decode()
        return json.loads(report.read_text(encoding="utf-8"))
