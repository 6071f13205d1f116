"""PyTorch: its own mean and subtraction on any device, which torch.compile can trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from gcx._memory import find_span
from gcx.backends import _canonical, _torch_dtensor, _torch_memory, one_by_one, refuse_dtype
from gcx.backends._torch_memory import PLAIN, SMALL, FanIn, average, is_simple, sum_over

_DENSE = torch.strided
_DTYPE, _IS_CPU = attrgetter("dtype"), attrgetter("is_cpu")

# Dtypes narrower than 32 bits, and the dtype to compute them in.
_FLOAT8 = [getattr(torch, f"float8_{kind}") for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")]
_WIDE = {
    torch.complex32: torch.complex64,
    **dict.fromkeys((torch.float16, torch.bfloat16, *_FLOAT8), torch.float32),
}
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
# Two floating dtypes are excluded: float8_e8m0fnu has no sign, float4_e2m1fn_x2 packs two numbers.
_DTYPES = frozenset((torch.float32, torch.float64, torch.complex64, torch.complex128, *_WIDE))

# Elements of a block in the canonical order: 2 MiB of float32. It fits into the second-level cache,
# and is large enough to hide the overhead of a torch call.
_BLOCK = 1 << 19


is_writable, find_memory = _torch_memory.is_writable, _torch_memory.find_memory
is_for_kernels: Callable[[Tensor], bool] = attrgetter("is_cuda")


def is_repeatable(grad: Tensor) -> bool:
    """Return True if `_torch_cuda.Call` may know a list that begins with this tensor."""
    return not torch.compiler.is_compiling() and is_for_kernels(grad)


def check_dtype(grad: Tensor, /) -> None:
    if grad.layout is not _DENSE:
        raise TypeError(
            f"expected a dense tensor, not one of layout {grad.layout}; call .to_dense(), "
            "or leave it out: a sparse gradient belongs to an embedding"
        )
    if grad.is_nested or isinstance(grad, UninitializedTensorMixin):
        raise TypeError("expected a tensor with a shape, not a nested or uninitialized one")
    if grad.dtype not in _DTYPES:
        refuse_dtype(grad.dtype)


def check_reproducible(grad: Tensor, axes: Sequence[int], /) -> None:
    _canonical.check_dtype(str(grad.dtype).removeprefix("torch."))
    kind = grad.device.type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and torch.version.hip):
        where = "ROCm" if kind == "cuda" else kind
        raise TypeError(
            f"reproducible=True is for tensors on a CPU or on CUDA, not on {where}; use .cpu()"
        )
    if type(grad) not in PLAIN and _torch_dtensor.is_dtensor(grad):
        _torch_dtensor.check_reproducible(grad, axes)


def centralize(
    grad: Tensor, axes: tuple[int, ...], strength: float, out: Tensor | None, reproducible: bool, /
) -> Tensor:
    if torch.compiler.is_compiling():
        if reproducible:  # compiled code would skip roundings
            by_itself = torch.compiler.disable(_centralize)  # type: ignore[no-untyped-call]
            return by_itself(grad, axes, strength, out, True)  # type: ignore[no-any-return]
    elif not reproducible and (out is None or out is grad) and is_simple(grad):
        wide = _WIDE.get(grad.dtype)
        if wide is None:
            return _torch_memory.subtract_average(grad, axes, strength, out)
        if grad.numel() <= SMALL:
            x = grad.type(wide)  # quicker than `to`
            _torch_memory.subtract_average(x, axes, strength, x)
            return x.type(grad.dtype) if out is None else grad.copy_(x)
    elif grad.is_cuda:
        return centralize_many([grad], [axes], strength, [out], reproducible)[0]
    return _centralize(grad, axes, strength, out, reproducible)


def centralize_many(
    grads: Sequence[Tensor],
    axes: Sequence[tuple[int, ...]],
    strength: float,
    outs: Sequence[Tensor | None],
    reproducible: bool,
    /,
) -> list[Tensor]:
    """Centralize as many tensors as the kernels take in few launches, and the rest by itself."""
    if torch.compiler.is_compiling() or not any(map(is_for_kernels, grads)):
        return _one_by_one(grads, axes, strength, outs, reproducible)
    fan_ins = [(grad.shape, fan_in) for grad, fan_in in zip(grads, axes, strict=True)]
    from gcx.backends import _torch_cuda

    launched = _torch_cuda.launch(grads, fan_ins, strength, outs, reproducible=reproducible)
    return [
        _centralize(grad, fan_in, strength, out, reproducible) if result is None else result
        for grad, fan_in, out, result in zip(grads, axes, outs, launched, strict=True)
    ]


_one_by_one = one_by_one(centralize)


def devices() -> list[str]:
    accelerators = torch.accelerator.device_count()
    kind = torch.accelerator.current_accelerator()
    return ["cpu", *(f"{kind}:{k}" for k in range(accelerators))]


def asarray(values: Any, dtype: str, device: str, /) -> Tensor:
    return torch.asarray(values, device=device).to(getattr(torch, dtype))


def to_numpy(array: Tensor, /) -> Any:
    return array.detach().cpu().to(_WIDE.get(array.dtype, array.dtype)).numpy().copy()


def why_no_kernels(grad: Tensor) -> str:
    """Say why the kernels do not run on the CUDA device of a tensor; empty if they do."""
    from gcx.backends import _torch_cuda

    return _torch_cuda.why_not(grad.device)


def fan_in_mean(x: Tensor, axes: tuple[int, ...], reproducible: bool = False, /) -> Tensor:
    if x.dtype in _WIDE:
        x = x.to(_WIDE[x.dtype])
    if type(x) not in PLAIN and _torch_dtensor.is_dtensor(x):
        if reproducible:
            return _torch_dtensor.of_parts(x, lambda here: _canonical_mean(here, axes))
        return _torch_dtensor.fan_in_mean(x, axes)
    if reproducible:
        return _canonical_mean(x, axes)
    if torch.compiler.is_compiling() and x.is_cpu:  # its programs add one by one
        return x.mean(axes, True, dtype=_DOUBLE.get(x.dtype)).to(x.dtype)
    if is_simple(x):
        return average(x, axes)
    for run in _torch_memory.find_runs(x, axes):
        x = x.mean(run, True)
    return x


def mean_over(x: Tensor, fan_in: FanIn, reproducible: bool) -> Tensor:
    """Average over a fan-in, in float32 or wider.

    The mean of a DTensor may be a partial sum; `subtract_mean_` adds up the parts.
    """
    shape, axes = fan_in
    if len(shape) == x.ndim:
        return fan_in_mean(x, axes, reproducible)
    if not _torch_dtensor.is_split(x, fan_in):
        return fan_in_mean(x.view(shape), axes, reproducible)
    if reproducible:  # no group is cut: see `check_reproducible_over`
        return fan_in_mean(x.view(shape), axes, True).squeeze(1)
    wide = x.to(_WIDE.get(x.dtype, x.dtype))
    assert _torch_dtensor.is_dtensor(wide)
    return _torch_dtensor.fan_in_mean_of_groups(wide, shape[0], axes)


def subtract_mean_(x: Tensor, mean: Tensor, fan_in: FanIn) -> None:
    """Subtract a mean from `mean_over` in place."""
    is_whole = len(fan_in[0]) == x.ndim or _torch_dtensor.is_split(x, fan_in)
    seen = x if is_whole else x.view(fan_in[0])
    subtract(seen, mean, seen)


def subtract_means_(
    grads: Sequence[Tensor],
    fan_ins: Sequence[FanIn],
    weights: Sequence[Tensor],
    rate: float | Tensor | None = None,
    *,
    strength: float = 1.0,
    reproducible: bool = False,
) -> None:
    """Centralize gradients in place, with the weight decay that an optimizer will add.

    Subtract ``strength * mean(grad + rate * weight)`` from each gradient: on CUDA in few launches,
    otherwise with torch's own operations. No gradient is expanded; `weights` are of the
    shapes of the gradients, and unused without a rate.
    """
    if not (reproducible or isinstance(rate, Tensor)) and _are_simple([*grads, *weights]):
        _torch_memory.subtract_averages(grads, tuple(fan_ins), strength, weights, rate)
        return
    left: Iterable[int] = range(len(grads))
    # The kernel needs a number, and reading it from a tensor would wait for the device.
    if not isinstance(rate, Tensor) and any(map(is_for_kernels, grads)):
        from gcx.backends import _torch_cuda

        decay = None if rate is None else (weights, rate)
        done = _torch_cuda.launch(
            grads, fan_ins, strength, grads, reproducible=reproducible, decay=decay
        )
        left = [k for k, result in enumerate(done) if result is None]
    for k in left:
        grad, fan_in, weight = grads[k], fan_ins[k], grads[k] if rate is None else weights[k]
        are_plain = type(grad) in PLAIN and type(weight) in PLAIN
        if grad.dtype in _WIDE and are_plain and not reproducible:
            if len(fan_in[0]) != grad.ndim:
                grad, weight = grad.view(fan_in[0]), weight.view(fan_in[0])
            _centralize_narrow(grad, fan_in[1], strength, grad, rate=rate, weight=weight)
            continue
        if reproducible and rate is not None:  # as the kernels do
            wide = _WIDE.get(grad.dtype, grad.dtype)
            mean = mean_over(grad.to(wide) + rate * weight.to(wide), fan_in, True)
        else:
            mean = mean_over(grad, fan_in, reproducible)
            if rate is not None:
                mean = mean + rate * mean_over(weight, fan_in, reproducible)
        subtract_mean_(grad, mean if strength == 1.0 else mean * strength, fan_in)


def _are_simple(tensors: Sequence[Tensor]) -> bool:
    """Return True for contiguous tensors of one dtype that are `is_simple`, in few calls."""
    dtypes = {*map(_DTYPE, tensors)}
    return (
        len(dtypes) == 1
        and dtypes.issubset((torch.float32, torch.float64))
        and {*map(type, tensors)}.issubset(PLAIN)
        and all(map(_IS_CPU, tensors))
        and is_simple(tensors[0])
        and all(map(Tensor.is_contiguous, tensors))
    )


def centralize_over(x: Tensor, fan_in: FanIn, strength: float, reproducible: bool) -> Tensor:
    """Return ``x - strength * mean(x)`` over a fan-in; the kernel computes it if it can."""
    shape, axes = fan_in
    if not _torch_dtensor.is_split(x, fan_in):
        seen = x if len(shape) == x.ndim else x.view(shape)
        return centralize(seen, axes, strength, None, reproducible).view(x.shape)
    mean = mean_over(x, fan_in, reproducible)
    return subtract(x, mean if strength == 1.0 else mean * strength)


def check_reproducible_over(x: Tensor, fan_in: FanIn) -> None:
    """Raise a TypeError if a fan-in cannot be summed in the order of `_canonical`."""
    axes = fan_in[1]
    # In the DTensor itself, groups and rows are one axis.
    own = tuple([axis - 1 for axis in axes]) if _torch_dtensor.is_split(x, fan_in) else axes
    check_reproducible(x, own)


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
    """Centralize with torch's own operations."""
    is_narrow = grad.dtype in _WIDE and type(grad) in PLAIN and not reproducible
    if is_narrow and not (torch.compiler.is_compiling() or _is_watched(grad)):
        return _centralize_narrow(grad, axes, strength, out)
    mean = fan_in_mean(grad, axes, reproducible)
    if strength != 1.0:
        mean = mean * strength
    return subtract(grad, mean, out)


def _is_watched(x: Tensor) -> bool:
    """Return True if autograd or a transformation of functions watches a tensor."""
    return (torch.is_grad_enabled() and x.requires_grad) or peek_interpreter_stack() is not None


def _centralize_narrow(
    grad: Tensor,
    axes: tuple[int, ...],
    strength: float,
    out: Tensor | None,
    *,
    rate: float | Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Centralize a copy in float32, in blocks that stay in the cache; see `subtract_means_`."""
    dtype = _WIDE[grad.dtype]

    def with_decay(mean: Callable[..., Tensor], x: Tensor, decaying: Tensor | None) -> Tensor:
        of_all = mean(x, axes) if rate is None else mean(x, axes) + rate * mean(decaying, axes)
        return of_all if strength == 1.0 else of_all * strength

    # Another `out` may share memory with the gradient.
    if grad.numel() <= SMALL or not grad.is_cpu or (out is not None and out is not grad):
        wide = grad.to(dtype)
        wide.sub_(with_decay(fan_in_mean, wide, weight))
        return wide.to(grad.dtype) if out is None else out.copy_(wide)
    cut, size = _torch_memory.find_block(grad)
    split = partial(torch.split, split_size_or_sections=size, dim=cut)
    widen = partial(_torch_memory.widen, dtype=dtype)
    mean = None
    if cut in axes:  # each block has a part of every fan-in
        add, zero = partial(sum_over, axes=axes), torch.zeros((), device="cpu")
        count = prod([grad.shape[axis] for axis in axes])
        mean = with_decay(lambda x, _: sum(map(add, widen(split(x))), zero) / count, grad, weight)
    result, parts = torch.empty_like(grad) if out is None else out, split(grad)
    targets = parts if result is grad else split(result)
    weights = parts if weight is None or weight is grad else split(weight)
    for wide, decaying, target in zip(widen(parts), weights, targets, strict=True):
        if rate is None and mean is None:
            target.copy_(_torch_memory.subtract_average(wide, axes, strength, wide))
        else:
            of_block = with_decay(fan_in_mean, wide, decaying) if mean is None else mean
            target.copy_(wide.sub_(of_block))
    return result


def subtract(x: Tensor, mean: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute ``x - mean`` in the dtype of the mean, and round once to the dtype of `x`."""
    if type(x) not in PLAIN and _torch_dtensor.is_dtensor(x):
        return _torch_dtensor.subtract(x, mean, out, subtract)
    if x.dtype in _WIDE:
        difference = (x.to(mean.dtype) - mean).to(x.dtype)
        return difference if out is None else out.copy_(difference)
    if out is None:
        return x - mean
    if out is x:
        return x.sub_(mean)
    if torch.compiler.is_compiling():
        return out.copy_(x - mean)
    starts, ends = zip(*[find_span(find_memory(y)) for y in (x, out)], strict=True)
    is_apart = max(starts) >= min(ends)
    return torch.sub(x, mean, out=out) if is_apart else out.copy_(x - mean)
