"""PyTorch: its own mean and subtraction, on any device, traced and compiled as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gcx.backends import _canonical, _torch_dtensor, one_by_one

_DENSE = torch.strided

# Dtypes narrower than 32 bits, and the dtype to compute them in.
_FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
_WIDE = {
    torch.complex32: torch.complex64,
    **dict.fromkeys((torch.float16, torch.bfloat16, *_FLOAT8), torch.float32),
}
# Not every floating dtype: float8_e8m0fnu has no sign, float4_e2m1fn_x2 packs two numbers in one.
_DTYPES = frozenset((torch.float32, torch.float64, torch.complex64, torch.complex128, *_WIDE))
# Types that are known to be on one process, without asking.
_PLAIN = (Tensor, Parameter)

# Elements that the canonical order handles at a time: 2 MiB of float32, which a second-level cache
# holds, and beside which the cost of a call of torch is small.
_BLOCK = 1 << 19


def check_dtype(grad: Tensor, /) -> None:
    """See `gcx.backends.Backend`."""
    if grad.layout is not _DENSE:
        msg = (
            f"expected a dense tensor, not one of layout {grad.layout}; call .to_dense(), "
            "or leave it out: sparse gradients are those of embeddings"
        )
        raise TypeError(msg)
    if grad.dtype not in _DTYPES:
        msg = f"expected a real or complex floating dtype, not {grad.dtype}"
        raise TypeError(msg)


def is_writable(array: Tensor, /) -> bool:
    """See `gcx.backends.Backend`."""
    if array.requires_grad and array.is_leaf and torch.is_grad_enabled():
        return False
    return 0 not in array.stride() or not _is_expanded(array)


def check_reproducible(grad: Tensor, axes: Sequence[int], /) -> None:
    """See `gcx.backends.Backend`."""
    _canonical.check_dtype(str(grad.dtype).removeprefix("torch."))
    kind = grad.device.type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and torch.version.hip):
        where = "ROCm" if kind == "cuda" else kind
        msg = f"reproducible=True is for tensors on a CPU or on CUDA, not on {where}; use .cpu()"
        raise TypeError(msg)
    if type(grad) not in _PLAIN and _torch_dtensor.is_dtensor(grad):
        _torch_dtensor.check_reproducible(grad, axes)


def reshape(array: Tensor, shape: tuple[int, ...], /) -> Tensor:
    """See `gcx.backends.Backend`."""
    return array.reshape(shape)


def centralize(
    grad: Tensor, axes: tuple[int, ...], strength: float, out: Tensor | None, reproducible: bool, /
) -> Tensor:
    """See `gcx.backends.Backend`."""
    if grad.is_cuda and not torch.compiler.is_compiling():
        (launched,) = _launched([grad], [axes], strength, [out], reproducible)
        if launched is not None:
            return launched
    if reproducible and torch.compiler.is_compiling():  # which rounds less often
        by_itself = torch.compiler.disable(_centralize)  # type: ignore[no-untyped-call]
        return by_itself(grad, axes, strength, out, reproducible)  # type: ignore[no-any-return]
    return _centralize(grad, axes, strength, out, reproducible)


def centralize_many(
    grads: Sequence[Tensor],
    axes: Sequence[tuple[int, ...]],
    strength: float,
    outs: Sequence[Tensor | None],
    reproducible: bool,
    /,
) -> list[Tensor]:
    """See `gcx.backends.Backend`; one launch for all that the kernels take."""
    if torch.compiler.is_compiling() or not any(grad.is_cuda for grad in grads):
        return _one_by_one(grads, axes, strength, outs, reproducible)
    launched = _launched(grads, axes, strength, outs, reproducible)
    return [
        _centralize(grad, fan_in, strength, out, reproducible) if result is None else result
        for grad, fan_in, out, result in zip(grads, axes, outs, launched, strict=True)
    ]


_one_by_one = one_by_one(centralize)


def devices() -> list[str]:
    """See `gcx.backends.Backend`."""
    accelerators = torch.accelerator.device_count()
    kind = torch.accelerator.current_accelerator()
    return ["cpu", *(f"{kind}:{k}" for k in range(accelerators))]


def asarray(values: Any, dtype: str, device: str, /) -> Tensor:
    """See `gcx.backends.Backend`."""
    return torch.asarray(values, device=device).to(getattr(torch, dtype))


def to_numpy(array: Tensor, /) -> Any:
    """See `gcx.backends.Backend`."""
    return array.detach().cpu().to(_WIDE.get(array.dtype, array.dtype)).numpy().copy()


def _is_expanded(array: Tensor) -> bool:
    """Whether several elements are in one place in memory."""
    strides = zip(array.stride(), array.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in strides)


def fan_in_mean(x: Tensor, axes: tuple[int, ...], reproducible: bool = False, /) -> Tensor:
    """See `gcx.backends.Backend`."""
    if x.dtype in _WIDE:
        x = x.to(_WIDE[x.dtype])
    if type(x) not in _PLAIN and _torch_dtensor.is_dtensor(x):
        if reproducible:
            return _torch_dtensor.of_parts(x, lambda here: _canonical_mean(here, axes))
        return _torch_dtensor.fan_in_mean(x, axes)
    if reproducible:
        return _canonical_mean(x, axes)
    return x.mean(axes if len(axes) > 1 else axes[0], True)  # keepdim; torch parses this faster


def fan_in_mean_of_groups(
    x: Tensor, groups: int, axes: tuple[int, ...], reproducible: bool = False
) -> Tensor:
    """Mean over `axes` of `x` seen as (groups, rows, ...), repeated for each row of `x`.

    Axis 1 is among `axes`, axis 0 is not.
    """
    if x.dtype in _WIDE:
        x = x.to(_WIDE[x.dtype])
    if type(x) not in _PLAIN and _torch_dtensor.is_dtensor(x):
        if reproducible:
            return _torch_dtensor.of_parts(
                x, lambda here: fan_in_mean_of_groups(here, groups, axes, True)
            )
        return _torch_dtensor.fan_in_mean_of_groups(x, groups, axes)
    rows = len(x) // groups
    mean = fan_in_mean(x.view(groups, rows, *x.shape[1:]), axes, reproducible)
    return mean.expand(-1, rows, *mean.shape[2:]).flatten(0, 1)


def _canonical_mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    if x.device.type != "cpu":
        return _canonical.fan_in_mean(x, axes, torch)  # type: ignore[no-any-return]
    first = tuple(slice(1) if axis in axes else slice(None) for axis in range(x.ndim))
    mean = torch.empty_like(x[first])
    for part in _canonical.blocks(x.shape, x.stride(), axes, _BLOCK):
        mean[part] = _canonical.fan_in_mean(x[part], axes, torch, _BLOCK)
    return mean


def _centralize(
    grad: Tensor, axes: tuple[int, ...], strength: float, out: Tensor | None, reproducible: bool
) -> Tensor:
    """Centralize by torch's own operations."""
    mean = fan_in_mean(grad, axes, reproducible)
    if strength != 1.0:
        mean = mean * strength
    return subtract(grad, mean, out)


def _launched(
    grads: Sequence[Tensor],
    axes: Sequence[tuple[int, ...]],
    strength: float,
    outs: Sequence[Tensor | None],
    reproducible: bool,
) -> list[Tensor | None]:
    """Centralize what the kernels take; None for the others."""
    # Imported with the first tensor on CUDA, and not where there is none.
    from gcx.backends import _torch_cuda

    return _torch_cuda.centralize_many(grads, axes, strength, outs, reproducible)


def subtract(x: Tensor, mean: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute ``x - mean`` in the dtype of the mean, rounded once to that of `x`."""
    if type(x) not in _PLAIN and _torch_dtensor.is_dtensor(x):
        return _torch_dtensor.subtract(x, mean, out, subtract)
    if x.dtype in _WIDE:
        difference = (x.to(mean.dtype) - mean).to(x.dtype)
        return difference if out is None else out.copy_(difference)
    if out is None:
        return x - mean
    return x.sub_(mean) if out is x else torch.sub(x, mean, out=out)
