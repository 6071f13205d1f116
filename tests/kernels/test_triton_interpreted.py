"""The Triton kernels, bit for bit against the canonical order in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from torch import Tensor

from gcx.backends import _tiles
from gcx.backends._torch_cuda import Launches, MultiTensor, centralize_many

import canonical_order

pytestmark = pytest.mark.usefixtures("on_cpu")

Axes = tuple[int, ...]

DTYPES = [getattr(torch, name) for name in canonical_order.DTYPES]


def plain(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype)


def behind(count: int, *shape: int) -> Callable[[torch.dtype], Tensor]:
    """Some elements behind the start of other memory."""
    size = int(np.prod(shape))
    return lambda dtype: torch.empty(count + size, dtype=dtype)[count:].view(shape)


def part(shape: tuple[int, ...], *index: Any) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype)[index]


def turned(shape: tuple[int, ...], *order: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype).permute(order)


CHANNELS_LAST = turned((5, 3, 3, 40), 0, 3, 1, 2)

# What a gradient is in memory, and its fan-in axes.
CASES: dict[str, tuple[Callable[[torch.dtype], Tensor], Axes]] = {
    "two": (plain(7, 2), (1,)),
    "three": (plain(5, 3), (1,)),
    "9": (plain(70, 9), (1,)),
    "stem": (plain(64, 3, 7, 7), (1, 2, 3)),
    "a power of two": (plain(5, 64), (1,)),
    "576": (plain(30, 576), (1,)),
    "1025": (plain(3, 1025), (1,)),
    "a tile": (plain(2, 4096), (1,)),
    "4608": (plain(3, 4608), (1,)),
    "14336": (plain(2, 14336), (1,)),
    "a segment": (plain(2, 16384), (1,)),
    "a segment and one": (plain(2, 16385), (1,)),
    "segments": (plain(2, 50000), (1,)),
    "one row": (plain(1, 100), (1,)),
    "all": (plain(8, 9), (0, 1)),
    "rows in wider ones": (part((20, 300), slice(None), slice(256)), (1,)),
    "rows of every second": (part((20, 300), slice(None), slice(None, None, 2)), (1,)),
    "behind one": (behind(1, 30, 64), (1,)),
    "behind three, columns": (behind(3, 64, 32), (0,)),
    "few columns": (plain(27, 64), (0,)),
    "9 columns": (plain(9, 7), (0,)),
    "two of fan-in": (plain(2, 33), (0,)),
    "HWIO": (plain(3, 3, 16, 40), (0, 1, 2)),
    "columns in parts": (plain(768, 50), (0,)),
    "columns in uneven parts": (plain(1500, 33), (0,)),
    "columns in wider ones": (part((300, 100), slice(None), slice(8, 72)), (0,)),
    "rows turned": (turned((40, 200), 1, 0), (0,)),
    "columns turned": (turned((200, 40), 1, 0), (1,)),
    "io": (plain(16, 8, 3, 3), (0, 2, 3)),
    "io, wide": (plain(300, 3, 5), (0, 2)),
    "io, long": (plain(700, 3, 7), (0, 2)),
    "oio": (plain(4, 50, 24), (1,)),
    "channels last": (CHANNELS_LAST, (1, 2, 3)),
    "experts of rows": (part((3, 20, 64), slice(None), slice(0, 10)), (2,)),
}


KINDS: list[Callable[[Any, Any, Any], Any]] = [
    lambda x, random, dtype: x,
    lambda x, random, dtype: x * 1e-3 + 1.7,
    lambda x, random, dtype: x * np.exp(random.uniform(-12, 3, x.shape)),
    lambda x, random, dtype: np.copysign(0, x),
    lambda x, random, dtype: np.full_like(x, -0.0),
    lambda x, random, dtype: x * 4 * torch.finfo(dtype).smallest_normal,
]


def filled(tensor: Tensor, axes: Axes, seed: int = 0) -> Tensor:
    """Fill with random numbers, of another kind in each output unit."""
    random = np.random.default_rng(seed)
    numbers = random.standard_normal(tuple(tensor.shape))
    for k, unit in enumerate(canonical_order.output_units(numbers.shape, axes), seed):
        numbers[unit] = KINDS[k % len(KINDS)](numbers[unit], random, tensor.dtype)
    return tensor.copy_(torch.from_numpy(numbers))


def numpy(tensor: Tensor) -> Any:
    name = str(tensor.dtype).removeprefix("torch.")
    wide = torch.float64 if name == "float64" else torch.float32
    return tensor.to(wide).numpy().copy()


def expected(grad: Tensor, axes: Axes, strength: float = 1.0) -> Any:
    return canonical_order.centralized(numpy(grad), axes, name_of(grad), strength)


def name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def assert_same_bits(found: Tensor, wanted: Any, what: object = None) -> None:
    result = numpy(found)
    bits = np.uint64 if wanted.dtype == np.float64 else np.uint32
    same = (result.view(bits) == wanted.view(bits)) | (np.isnan(result) & np.isnan(wanted))
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} differ"


def run(roles: list[list[Tensor]], axes: list[Axes], **scalars: float) -> None:
    multi_tensor = MultiTensor("centralize", roles, axes, any_order=False)
    multi_tensor.run(roles, **{"strength": 1.0, "rate": 0.0, **scalars})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_shapes_in_one_list(dtype: torch.dtype) -> None:
    axes = [axes for _, axes in CASES.values()]
    grads = [filled(make(dtype), axes, k) for k, (make, axes) in enumerate(CASES.values())]
    wanted = [expected(*case) for case in zip(grads, axes, strict=True)]
    run([grads, grads, grads], axes)
    for name, grad, each in zip(CASES, grads, wanted, strict=True):
        assert_same_bits(grad, each, name)


@pytest.mark.parametrize("fan_in", [4608, 14336, 16384, 16385, 50000])
def test_long_columns(fan_in: int, on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.setattr(_tiles, "TILE_ONE_BY_ONE", 1 << 14)  # fewer tiles are done sooner
    grad = filled(torch.empty(fan_in, 34), (0,))
    wanted = expected(grad, (0,))
    run([[grad]] * 3, [(0,)])
    assert_same_bits(grad, wanted)


def test_long_columns_in_tiles_of_the_usual_size() -> None:
    grad = filled(torch.empty(17000, 8), (0,))
    wanted = expected(grad, (0,))
    run([[grad]] * 3, [(0,)])
    assert_same_bits(grad, wanted)


@pytest.mark.parametrize("fan_in", [16385, 50000])
def test_long_runs(fan_in: int) -> None:
    grad = filled(torch.empty(fan_in // 5, 2, 5), (0, 2))
    wanted = expected(grad, (0, 2))
    run([[grad]] * 3, [(0, 2)])
    assert_same_bits(grad, wanted)


@pytest.mark.parametrize("shape", [(5, 3, 3, 40), (3, 5, 5, 180), (20, 1, 9, 12)], ids=str)
def test_order_of_memory_in_channels_last(shape: tuple[int, ...]) -> None:
    grad = filled(torch.empty(shape), (1, 2, 3)).permute(0, 3, 1, 2)
    of_memory, of_axes = (expected(x, (1, 2, 3)) for x in (grad.permute(0, 2, 3, 1), grad))
    launches = Launches()
    again = grad.clone()
    with torch.no_grad():
        assert launches.centralize_([grad], [(1, 2, 3)]) == []
        assert launches.centralize_([again], [(1, 2, 3)], reproducible=True) == []
    assert_same_bits(grad.permute(0, 2, 3, 1), of_memory)
    assert_same_bits(again, of_axes)


def test_a_thousand_small_tensors() -> None:
    random = np.random.default_rng(0)
    grads = [filled(torch.empty(*random.integers(1, 9, 2), 3), (1, 2)) for _ in range(1000)]
    wanted = [expected(grad, (1, 2)) for grad in grads]
    assert centralize_many(grads, [(1, 2)] * 1000, 1.0, grads) == grads
    for grad, each in zip(grads, wanted, strict=True):
        assert_same_bits(grad, each)


@pytest.mark.parametrize("axes", [(1,), (0,), (0, 2)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_unit(bad: float, axes: Axes) -> None:
    grad = torch.randn((300, 40, 20) if len(axes) == 2 else (300, 40))
    grad[(7, 5) if grad.ndim == 2 else (7, 5, 3)] = bad
    with np.errstate(invalid="ignore"):
        wanted = expected(grad, axes)
        run([[grad]] * 3, [axes])
    assert_same_bits(grad, wanted)
    units = canonical_order.output_units(tuple(grad.shape), axes)
    assert sum(not grad[unit].isfinite().all() for unit in units) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.75])
def test_strength(strength: float, dtype: torch.dtype) -> None:
    grads = [filled(torch.empty(9, 130, dtype=dtype), axes) for axes in ((1,), (0,))]
    wanted = [expected(grads[0], (1,), strength), expected(grads[1], (0,), strength)]
    before = [grad.clone() for grad in grads]
    results = centralize_many(grads, [(1,), (0,)], strength, [None, None])
    for grad, result, each, kept in zip(grads, results, wanted, before, strict=True):
        assert_same_bits(result, each)
        assert torch.equal(grad, kept)


@pytest.mark.parametrize("shape", [(9, 130), (300, 40), (2, 5000)], ids=str)
@pytest.mark.parametrize("axes", [(1,), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rate_of_weights(dtype: torch.dtype, axes: Axes, shape: tuple[int, ...]) -> None:
    """Weights may be wider than gradients."""
    grad = torch.randn(shape).to(dtype)
    weight = torch.randn(shape) + 3
    x, w = numpy(grad), numpy(weight)
    wanted = np.empty_like(x)
    for unit in canonical_order.output_units(shape, axes):
        of_weight = canonical_order.scaled_mean(w[unit], 0.01)
        shift = canonical_order.scaled_mean(x[unit], 1.0) + of_weight
        wanted[unit] = canonical_order.rounded(x[unit] - shift, name_of(grad))
    with torch.no_grad():
        assert Launches().centralize_([grad], [axes], [weight], 0.01) == []
    assert_same_bits(grad, wanted)
