"""GC on eight devices: of gradients in parts by `axis_name`, and in train steps under `jax.jit`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import gcx.optax
from gcx import Layout

import jax_shards
from jax_shards import CASES
from reference import centralized

# XLA divides a program in the same way for the devices of two processes: these stand for the rest.
IN_TWO_PROCESSES = ("step, fan-in", "step, tensor parallel", "step, fan-out")
N_DEVICES = 8
SECONDS = 150  # before processes that wait for each other are ended


def seen_by(*cases: str, processes: int = 1) -> Any:
    """Run cases, or all, in processes of their own; return the JSON of the first."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={N_DEVICES // processes}",
    }
    with TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        report = Path(folder) / "report.json"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])  # which is free
        command = [sys.executable, jax_shards.__file__, str(report), port, str(processes)]
        run: Any = partial(subprocess.run, env=environment, capture_output=True, timeout=SECONDS)
        commands = [[*command, str(process), *cases] for process in range(processes)]
        for ended in pool.map(run, commands):
            assert ended.returncode == 0, ended.stderr.decode()
        return json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def seen() -> Any:
    return {1: seen_by(), 2: seen_by(*IN_TWO_PROCESSES, processes=2)}


@pytest.mark.parametrize(
    ("processes", "case"), [(1, case) for case in CASES] + [(2, case) for case in IN_TWO_PROCESSES]
)
def test_is_right_and_communicates_the_means(seen: Any, processes: int, case: str) -> None:
    (expected, _), found = CASES[case], seen[processes][case]
    if isinstance(expected, str):
        assert expected in found["raises"]
        return
    half_ulp = 2.0**-7  # of a bfloat16 from 2 to 4
    assert max(found["error"]) < (half_ulp if "bfloat16" in case else 1e-6)
    assert found["collectives"] == expected, "the means, and no gradient"
    assert found["keeps"]


def random(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


# Four parts of each.
GRADS = {"up": {"kernel": random(4, 3, 4)}, "down": {"kernel": random(4, 4, 2)}}


@pytest.mark.parametrize(
    "axis_name",
    [
        {"up/kernel": None, "down/kernel": "parts"},
        {"down/*": "parts"},
        {"up/*": (), "*": ("parts",)},
    ],
)
def test_each_parameter_is_split_in_its_own_way(axis_name: Any) -> None:
    """A named axis of `jax.vmap` stands for the devices; tensor parallel."""
    optimizer = gcx.optax.centralize("flax", axis_name=axis_name)
    optimizer.init(GRADS)
    update = partial(optimizer.update, state=optax.EmptyState())
    updates, _ = jax.vmap(update, axis_name="parts")(GRADS)
    for part in range(4):
        np.testing.assert_allclose(
            updates["up"]["kernel"][part], centralized(GRADS["up"]["kernel"][part], (0,)), atol=1e-6
        )
    np.testing.assert_allclose(
        updates["down"]["kernel"], centralized(GRADS["down"]["kernel"], (0, 1)), atol=1e-6
    )


def test_a_part_may_have_a_fan_in_of_one() -> None:
    params = {"kernel": np.zeros((1, 4))}
    with pytest.raises(ValueError, match="nothing to centralize"):
        gcx.optax.centralize("flax").init(params)
    optimizer = gcx.optax.centralize("flax", axis_name="x", strength=0.5)
    optimizer.init(params)
    parts = {"kernel": random(2, 1, 4)}
    updates, _ = jax.vmap(lambda p: optimizer.update(p, optax.EmptyState()), axis_name="x")(parts)
    expected = (parts["kernel"] + centralized(parts["kernel"], (0, 1))) / 2
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-6)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_name_that_is_not_bound(run: Any) -> None:
    optimizer = gcx.optax.centralize("flax", axis_name="x")
    update = run(partial(optimizer.update, state=optax.EmptyState()))
    with pytest.raises(NameError, match="unbound axis name: x"):
        update(GRADS)


def test_a_key_that_matches_no_parameter_unless_leaves_are_hidden() -> None:
    optimizer = gcx.optax.centralize("flax", axis_name={"up/*": "x", "down/*": None})
    optax.masked(optimizer, {"up": True, "down": False}).init(GRADS)
    optimizer = gcx.optax.centralize("flax", axis_name={"donw/kernel": "x"})
    message = "axis_name: 'donw/kernel' matches no parameter; there are: down/kernel, up/kernel"
    with pytest.raises(ValueError, match=message):
        optimizer.init(GRADS)
    with pytest.raises(ValueError, match=message):
        optimizer.update(GRADS, optax.EmptyState())


@pytest.mark.parametrize(
    "axis_name", [3, ("x", None), P("x"), {"*": P("x", None)}, {"*": 0}, ["x"], {1: "x"}]
)
def test_what_is_no_axis_name(axis_name: Any) -> None:
    with pytest.raises(TypeError, match=r"axis_name"):
        gcx.optax.centralize("flax", axis_name=axis_name).init(GRADS)


def test_reproducible_is_refused_for_a_fan_in_that_is_split() -> None:
    params = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": jnp.ones((4, 2))}}
    names = {"a/kernel": None, "b/kernel": "x"}
    transform = gcx.optax.centralize("flax", axis_name=names, reproducible=True)
    with pytest.raises(TypeError, match=r"b/kernel: reproducible=True .* over \('x',\)"):
        transform.init(params)
    with pytest.raises(TypeError, match=r"b/kernel: reproducible=True"):
        transform.update(params, optax.EmptyState())
    del params["b"], names["b/kernel"]
    transform = gcx.optax.centralize("flax", axis_name=names, reproducible=True)
    updates, _ = transform.update(params, transform.init(params))
    assert not np.any(updates["a"]["kernel"])


def test_a_layout_that_splits_an_axis_is_not_for_shards() -> None:
    layouts = {"weight": Layout("(bi)o...", b=2)}
    update = gcx.optax.centralize(layouts, axis_name="d").update
    sharded = jax.vmap(lambda g: update(g, optax.EmptyState())[0], axis_name="d")
    with pytest.raises(ValueError, match=r"^weight: Layout\(.* splits an axis of the whole weight"):
        sharded({"weight": random(1, 8, 3)})
