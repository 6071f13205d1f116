"""The Triton kernels, bit for bit against the canonical order in plain NumPy."""

from __future__ import annotations

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
from kernel_cases import (
    CASES,
    DTYPES,
    Axes,
    assert_same_bits,
    expected,
    filled,
    name_of,
    numpy,
)

pytestmark = pytest.mark.usefixtures("on_cpu")


def run(roles: list[list[Tensor]], axes: list[Axes], **scalars: float) -> None:
    multi_tensor = MultiTensor("centralize", roles, axes, any_order=False)
    multi_tensor.run(roles, **{"strength": 1.0, "rate": 0.0, **scalars})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_shapes_in_one_list(dtype: torch.dtype) -> None:
    axes = [axes for _, axes in CASES.values()]
    grads = [filled(make(dtype), axes, k) for k, (make, axes) in enumerate(CASES.values())]
    wanted = [expected(*case) for case in zip(grads, axes, strict=True)]
    run([grads, grads, grads], axes)
    for grad, each in zip(grads, wanted, strict=True):
        assert_same_bits(grad, each)


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


def test_hundreds_of_small_tensors() -> None:
    random = np.random.default_rng(0)
    grads = [filled(torch.empty(*random.integers(1, 9, 2), 3), (1, 2)) for _ in range(300)]
    wanted = [expected(grad, (1, 2)) for grad in grads]
    assert centralize_many(grads, [(1, 2)] * 300, 1.0, grads) == grads
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


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((9, 130), (1,)), ((2, 5000), (1,)), ((300, 40), (0,)), ((9, 33), (0,)), ((40, 6, 7), (0, 2))],
    ids=str,
)
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


def test_first_step_of_sgd_does_not_read_its_buffer() -> None:
    grad, weight = torch.randn(6, 70), torch.zeros(6, 70)
    roles = [[grad], [weight], [torch.full_like(grad, float("nan"))]]
    options = {"momentum": 0.9, "dampening": 0.1, "nesterov": False, "maximize": False}
    kernel = MultiTensor("sgd", roles, [(1,)], any_order=True)
    kernel.run(roles, lr=1.0, weight_decay=0.0, first=True, **options)
    assert_same_bits(roles[2][0], expected(grad, (1,)))
    assert torch.equal(weight, -roles[2][0])


def test_moments_wider_than_parameters() -> None:
    grad, weight = (torch.randn(6, 70).bfloat16() for _ in range(2))
    first, second = torch.zeros(6, 70), torch.zeros(6, 70)
    kernel = MultiTensor("adamw", [[grad], [weight], [first], [second]], [(1,)], any_order=True)
    scalars = {"step_size": 0.5, "beta1": 0.5, "beta2": 0.5, "eps": 1.0, "decay": 0.0}
    x = torch.from_numpy(numpy(grad) - canonical_means(grad))
    wanted = weight.float() - 0.5 * (x / 2) / ((x * x / 2).sqrt() + 1)
    kernel.run([[grad], [weight], [first], [second]], **scalars, bias2_root=1.0, maximize=False)
    assert torch.equal(first, x / 2)
    assert torch.equal(second, x * x / 2)
    assert torch.equal(weight, wanted.bfloat16())


def canonical_means(grad: Tensor) -> Any:
    return np.stack([[canonical_order.scaled_mean(row, 1.0)] for row in numpy(grad)])
