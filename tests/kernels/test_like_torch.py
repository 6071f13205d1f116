"""Steps of AdamW and SGD stay within 2 ulp of torch's fused steps on CUDA.

Both are in NumPy here: test_bits.py holds the kernels to `rules_in_numpy`, and torch's steps are
written from fused_adam_utils.cuh (2.11 and later) and FusedSgdKernel.cu, with products and sums
fused as nvcc fuses them. `python -m benchmarks gpu --check` has the same shapes.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from rules_in_numpy import fma, step_adamw, step_sgd

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

STEPS, ULP = 100, 2.0

# Units and fan-in. One unit is a parameter that is not centralized.
SHAPES = [
    *[(64, 147), (64, 64), (64, 576), (256, 64), (64, 256), (128, 256), (128, 1152)],
    *[(16, 14_336), (30, 2048), (48, 144), (40, 3072), (1, 64), (1, 1000)],
]

LR, BETAS, DECAY, EPS = 1e-3, (0.9, 0.999), 1e-2, 1e-8
SGD_LR, MOMENTUM, SGD_DECAY = 1e-2, 0.9, 1e-4

Arrays = dict[str, Any]
f32, f64 = np.float32, np.float64


def adamw_of_torch(t: int, grad: Any, x: Arrays) -> Arrays:
    lr, (beta1, beta2), decay, eps = f32(LR), map(f32, BETAS), f32(DECAY), f32(EPS)
    correction1, correction2 = (f32(1) - powf(b, t) for b in (beta1, beta2))
    weight = fma(-(lr * decay), x["weight"], x["weight"])
    exp_avg = fma(beta1, x["exp_avg"], fma(-beta1, grad, grad))
    square = grad * grad
    exp_avg_sq = fma(beta2, x["exp_avg_sq"], fma(-beta2, square, square))
    denominator = np.sqrt(exp_avg_sq) / np.sqrt(correction2) + eps
    weight = weight - lr / correction1 * exp_avg / denominator
    return {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def adamw_of_kernels(t: int, grad: Any, x: Arrays) -> Arrays:
    beta1, beta2 = (float(f32(beta)) for beta in BETAS)
    correction1, correction2 = (f32(1 - float(f32(beta**t))) for beta in (beta1, beta2))
    decay, step_size = f32(f32(LR) * f32(DECAY)), f32(f32(LR) / correction1)
    return step_adamw(grad, x, (1.0, decay, beta1, beta2, step_size, np.sqrt(correction2), EPS))


def sgd_of_torch(t: int, grad: Any, x: Arrays) -> Arrays:
    wide = {role: array.astype(f64) for role, array in x.items()}
    grad = fma(f64(SGD_DECAY), wide["weight"], grad.astype(f64)).astype(f32).astype(f64)
    buffer = grad if t == 1 else fma(f64(MOMENTUM), wide["buffer"], grad)
    nesterov = fma(f64(MOMENTUM), buffer, grad).astype(f32).astype(f64)
    weight = fma(f64(-SGD_LR), nesterov, wide["weight"]).astype(f32)
    return {"weight": weight, "buffer": buffer.astype(f32)}


def sgd_of_kernels(t: int, grad: Any, x: Arrays) -> Arrays:
    return step_sgd(grad, x, (1.0, -SGD_LR, MOMENTUM, 1.0, float(t == 1), 1.0), SGD_DECAY)


# The two steps, the state beside the weights, and the rate of decay in the mean.
OPTIMIZERS: dict[str, Any] = {
    "AdamW": ((adamw_of_torch, adamw_of_kernels), ("exp_avg", "exp_avg_sq"), 0.0),
    "SGD": ((sgd_of_torch, sgd_of_kernels), ("buffer",), SGD_DECAY),
}


def powf(base: Any, exponent: int) -> Any:
    """Round correctly, as CUDA's powf does for these bases up to 100, or in ``1 - powf``.

    (This can be computed from its PTX, whatever the error of its reciprocal.)
    """
    return f32(float(base) ** exponent)


def centralized(grad: Any, weight: Any, rate: float) -> Any:
    """In any order, as both steps have the same mean."""
    return grad - fma(f32(rate), weight, grad).mean(axis=1, keepdims=True, dtype=f32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_distance_after_many_steps(optimizer: str, shape: tuple[int, int]) -> None:
    steps, state, rate = OPTIMIZERS[optimizer]
    is_centralized = shape[0] > 1
    random = np.random.default_rng(0)
    bound = shape[1] ** -0.5
    drawn = random.uniform(-bound, bound, shape).astype(f32)
    start = {"weight": drawn if is_centralized else np.ones(shape, f32)}
    start |= {role: np.zeros(shape, f32) for role in state}
    arrays = [start, start]
    for t in range(1, STEPS + 1):
        grad = random.standard_normal(shape, dtype=f32)
        for k, (step, x) in enumerate(zip(steps, arrays, strict=True)):
            used = centralized(grad, x["weight"], rate) if is_centralized else grad
            arrays[k] = step(t, used, x)
    one, other = (x["weight"].astype(f64) for x in arrays)
    largest = np.maximum(abs(one), abs(other)).max(axis=1, keepdims=True)
    distance = (abs(one - other) / np.spacing(largest.astype(f32))).max()
    assert distance <= ULP
