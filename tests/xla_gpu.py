"""Memory traffic of an optimizer step on an H200, from what XLA compiles for one without having it.

Not collected with the other tests, since it needs an environment of its own: jax-cuda13-plugin and
jax-cuda13-pjrt in the version of jaxlib, without their dependencies. ``nox -s xla_gpu``.
"""

from __future__ import annotations

import os
import re
from math import prod
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the libraries that running would need
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import gcx
import gcx.optax
from gcx.backends import _jax

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}
INSTRUCTION = re.compile(r"%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)")
NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def bytes_moved(hlo: str) -> int:
    """Bytes that the kernels of a program read and write, each its operands and results."""
    size = {}
    moved = 0
    for name, shape, kind, operands in INSTRUCTION.findall(hlo[hlo.index("\nENTRY") :]):
        size[name] = sum(
            BYTES[dtype] * prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )
        if kind not in NO_TRAFFIC:
            moved += size[name] + sum(size[o] for o in re.findall(r"%([\w.-]+)", operands))
    return moved


@pytest.fixture(scope="module")
def h200() -> SingleDeviceSharding:
    """Where to put what is compiled."""
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology="1x1x1"
    )
    (device,) = found.devices
    assert device.device_kind == "NVIDIA H200"
    return SingleDeviceSharding(device)


def bytes_a_step(optimizer: optax.GradientTransformation, weight: jax.ShapeDtypeStruct) -> int:
    """Whole bytes for an element of the weight; what is left over are vectors, the means."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"weight": weight}
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=weight.sharding),
        jax.eval_shape(optimizer.init, params),
    )
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return bytes_moved(program.as_text()) // weight.size


# Optimizers, and the bytes that a step moves for an element in float32.
OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, int]] = {
    "adamw": (optax.adamw(1e-3), 28),
    "sgd": (optax.sgd(0.1), 12),
    "momentum": (optax.sgd(0.1, momentum=0.9), 20),
    "lion": (optax.lion(1e-4), 20),
    "clip and adamw": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 32),
}
SQUARE = [("o...", (4096, 4096)), ("...o", (4096, 4096))]
WEIGHTS = [
    *[("o...", (4096, 14336)), ("...o", (14336, 4096)), ("o...", (768, 3072))],
    *[("...o", (3072, 768)), ("o...", (512, 512, 3, 3)), ("...o", (3, 3, 512, 512))],
    *[("ioo", (2048, 16, 128)), ("oio", (8, 4096, 1024))],
]


@pytest.mark.parametrize(
    ("name", "layout", "shape", "dtype"),
    [
        *[("adamw", *weight, dtype) for weight in WEIGHTS for dtype in ("float32", "bfloat16")],
        *[(name, *weight, "float32") for weight in SQUARE for name in OPTIMIZERS],
    ],
)
def test_gc_reads_the_gradient_once_more(
    h200: Any, name: str, layout: str, shape: tuple[int, ...], dtype: str
) -> None:
    """Which is the least where the step and the means are kernels of their own."""
    optimizer, plain = OPTIMIZERS[name]
    weight = jax.ShapeDtypeStruct(shape, dtype, sharding=h200)
    gc = gcx.optax.centralize({"weight": layout})
    assert bytes_a_step(optimizer, weight) == plain * weight.dtype.itemsize // 4
    with_gc = bytes_a_step(optax.chain(gc, optimizer), weight)
    assert with_gc == (plain + 4) * weight.dtype.itemsize // 4


@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096)])
def test_the_peer_reads_it_three_times(h200: Any, shape: tuple[int, ...]) -> None:
    weight = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=h200)
    assert bytes_a_step(optax.chain(optax.centralize(), optax.adamw(1e-3)), weight) == 40


@pytest.mark.parametrize("layout", ["o...", "...o"])
def test_the_count_tells_when_the_means_are_not_kept(
    h200: Any, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda mean: mean)
    weight = jax.ShapeDtypeStruct((2048, 1024), jnp.float32, sharding=h200)  # of no other test
    gc = gcx.optax.centralize({"weight": layout})
    expected = {"o...": 40, "...o": 32}  # columns are two kernels anyway
    assert bytes_a_step(optax.chain(gc, optax.adamw(1e-3)), weight) == expected[layout]


@pytest.mark.parametrize(
    ("fan_in", "axis", "least", "donated"),
    [(4096, 1, 8, 16), (32768, 1, 12, 12), (4096, 0, 12, 12)],
    ids=["row", "long row", "column"],
)
def test_a_call_by_itself(h200: Any, fan_in: int, axis: int, least: int, donated: int) -> None:
    """One kernel reads and writes where the fan-in lies together in memory, and is not too long.

    It cannot write to where it reads, so a donated gradient is copied first.
    """
    shape = (4096, fan_in) if axis == 1 else (fan_in, 4096)
    grad = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=h200)
    for donated_arguments, moved in (((), least), ((0,), donated)):
        alone = jax.jit(
            lambda g: _jax._centralize(g, None, (axis,), (), False),
            donate_argnums=donated_arguments,
        )
        assert bytes_moved(alone.lower(grad).compile().as_text()) // grad.size == moved
