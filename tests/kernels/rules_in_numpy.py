"""The rules of kernels.cu in NumPy, written from torch's own kernels.

Arrays have the precision of sums: float64 for float64, else float32. The fan-in is the last axis.
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import canonical_order

# Arrays of each rule. With a rate, the mean is over grad + rate * weight.
ROLES = {
    "Store": ("grad", "out"),
    "StoreRate": ("grad", "out", "weight"),
    "AdamW": ("grad", "weight", "exp_avg", "exp_avg_sq"),
    "Sgd": ("grad", "weight"),
    "SgdRate": ("grad", "weight"),
    "SgdMomentum": ("grad", "weight", "buffer"),
    "SgdMomentumRate": ("grad", "weight", "buffer"),
}
RULES = tuple(ROLES)

_FMA = "\n".join(
    f"""extern "C" void fma_{t}(long n, const {t}* a, const {t}* b, const {t}* c, {t}* to) {{
  for (long k = 0; k < n; k++) to[k] = std::fma(a[k], b[k], c[k]);
}}"""
    for t in ("float", "double")
)


def fma(a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` in the precision of the arrays, rounded once."""
    a, b, c = map(np.ascontiguousarray, np.broadcast_arrays(a, b, c))
    assert a.dtype == b.dtype == c.dtype
    to = np.empty_like(a)
    compute = getattr(_library(), "fma_double" if a.dtype == np.float64 else "fma_float")
    compute(ctypes.c_long(a.size), *(ctypes.c_void_p(x.ctypes.data) for x in (a, b, c, to)))
    return to


@cache
def _library() -> Any:
    with TemporaryDirectory() as folder:
        source, result = Path(folder, "fma.cpp"), Path(folder, "fma.so")
        source.write_text(f"#include <cmath>\n{_FMA}")
        command = ("g++", "-O2", "-march=native", "-fPIC", "-shared")
        subprocess.run([*command, source, "-o", result], check=True)
        return ctypes.CDLL(str(result))


def apply(
    rule: str, arrays: dict[str, Any], numbers: tuple[float, ...], *, centralized: bool
) -> dict[str, Any]:
    """Compute new contents; `numbers` are the strength, the rate, and the numbers of the rule."""
    grad, weight = arrays["grad"], arrays.get("weight")
    wide = grad.dtype.type
    strength, rate = map(wide, numbers[:2])
    summed = grad + rate * weight if rule.endswith("Rate") else grad
    if centralized:
        sums = canonical_order.canonical_sum(np.ascontiguousarray(summed.T))
        grad = grad - (sums / wide(summed.shape[1]) * strength)[:, None]
    if rule.startswith("Store"):
        return {"out": grad}
    if rule == "AdamW":
        return step_adamw(grad, arrays, numbers[2:])
    return step_sgd(grad, arrays, numbers[2:], numbers[1] if rule.endswith("Rate") else 0.0)


def step_adamw(grad: Any, arrays: dict[str, Any], numbers: tuple[float, ...]) -> dict[str, Any]:
    """Do as adam_math in fused_adam_utils.cuh, which torch has since 2.11."""
    wide = grad.dtype.type
    sign, decay, beta1, beta2, step_size, root_of_correction, eps = map(wide, numbers)
    grad = sign * grad
    square = grad * grad
    weight = fma(-decay, arrays["weight"], arrays["weight"])
    exp_avg = fma(beta1, arrays["exp_avg"], fma(-beta1, grad, grad))
    exp_avg_sq = fma(beta2, arrays["exp_avg_sq"], fma(-beta2, square, square))
    weight = weight - step_size * exp_avg / (np.sqrt(exp_avg_sq) / root_of_correction + eps)
    return {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def step_sgd(
    grad: Any, arrays: dict[str, Any], numbers: tuple[float, ...], decay: float
) -> dict[str, Any]:
    """Do as sgd_math in torch's FusedSgdKernel.cu, which takes numbers in float64."""
    wide = grad.dtype.type
    sign, minus_lr, momentum, undamped, is_first, is_nesterov = map(np.float64, numbers)
    x = {role: array.astype(np.float64) for role, array in {**arrays, "grad": grad}.items()}
    if decay:
        grad = fma(np.float64(decay), x["weight"], x["grad"]).astype(wide)
    grad = (sign * grad.astype(np.float64)).astype(wide)
    result = {}
    if "buffer" in x:
        g = grad.astype(np.float64)
        buffer = g if is_first else fma(momentum, x["buffer"], undamped * g)
        result["buffer"] = buffer.astype(wide)
        grad = (fma(momentum, buffer, g) if is_nesterov else buffer).astype(wide)
    result["weight"] = fma(minus_lr, grad.astype(np.float64), x["weight"]).astype(wide)
    return result
