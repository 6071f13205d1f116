"""PyTorch on CUDA: lists of gradients, centralized in one launch of a Triton kernel for each dtype.

What the kernel does not take, PyTorch's own operations do. Triton is imported when the first tensor
on a CUDA device arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import cache, lru_cache, partial
from math import inf

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from gcx.backends import _tiles
from gcx.backends._tiles import Axes
from gcx.backends._torch_triton import (
    MultiTensor,
    Roles,
    TritonFailsError,
    failures,
    forms,
    waiting,
)

__all__ = ["Launches", "MultiTensor", "centralize_many", "launches", "takes", "why_not"]

_OLDEST_TRITON = (3, 5)
_OLDEST_DEVICE = (8, 0)  # that Triton supports
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = (Tensor, Parameter)
_MOST_PLANS = 16


def why_not(device: torch.device | None = None) -> str:
    """Tell why tensors on a CUDA device, by default the current one, are left to PyTorch.

    The answer is empty if they are not. The first time for a device, the kernel is tried.
    """
    if device is None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        device = torch.device("cuda", torch.cuda.current_device())
    reason = _lack(device) or failures.get(device, "")
    if reason or torch.cuda.is_current_stream_capturing():  # where nothing can be tried
        return reason
    return _failure(device)


def takes(grad: Tensor, axes: Axes, out: Tensor | None = None) -> bool:
    """Whether a tensor, with these fan-in axes or none, is one for the kernel.

    It takes ordinary tensors on a CUDA device, of dtypes and strides that it knows, while nobody
    wants to see what is done with them, as autograd and compilers do. `out`, if it is not `grad`,
    has the same strides and lies apart.
    """
    return (
        _is_on_cuda(grad)
        and not _is_traced()
        and _fits(grad, axes, out)
        and not why_not(grad.device)
    )


def centralize_many(
    grads: Sequence[Tensor],
    axes: Sequence[Axes],
    strength: float,
    outs: Sequence[Tensor | None],
    reproducible: bool = False,
) -> list[Tensor | None]:
    """Centralize those gradients that the kernel takes; see `gcx.backends.Backend`.

    The result is None where nothing has been done, and PyTorch is to do it. That is so for all of
    them where something is written to memory that another one lies in.
    """
    results: list[Tensor | None] = [None] * len(grads)
    places = _taken(grads, axes, outs)
    is_written = len(grads) > 1 and any(out is not None for out in outs)
    if not places or (is_written and _interfere(grads, outs)):
        return results
    chosen = [grads[k] for k in places]
    targets = [_target(grads[k], outs[k]) for k in places]
    fan_ins = [axes[k] for k in places]
    roles = (chosen, chosen, targets)
    make = partial(_Plan, roles, fan_ins, any_order=not reproducible)
    plan = _kept(_plans, (*forms(chosen), *fan_ins, reproducible), make)
    left = plan.run(roles, strength, 0.0)
    for n, k in enumerate(places):
        results[k] = None if n in left else targets[n]
    return results


class Launches:
    """Centralizes lists of gradients in place, fast where lists are alike from call to call."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, _Plan] = {}
        # One value, since another thread may set its own at any moment.
        self._last: tuple[object, _Plan] = (None, _Plan(((), (), ()), (), any_order=True))

    def centralize_(
        self,
        grads: Sequence[Tensor],
        axes: Sequence[Axes],
        weights: Sequence[Tensor] | None = None,
        rate: float = 0.0,
        *,
        strength: float = 1.0,
        reproducible: bool = False,
    ) -> list[int]:
        """Subtract `strength` times the mean of each gradient, and `rate` times that of its weight.

        Parameters
        ----------
        grads : sequence of Tensor
            Gradients, on any devices; no two of them share memory.
        axes : sequence of tuple of int
            The fan-in axes of each.
        weights : sequence of Tensor, optional
            The weight of each, of the same shape.
        rate : float, optional
            For example the weight decay that an optimizer adds to the gradient, times `strength`.
        strength : float, optional
            The part of the mean of the gradient to subtract.
        reproducible : bool, optional
            Whether to sum in the order of the axes, whatever the order of memory is.

        Returns
        -------
        list of int
            Positions of the gradients that are left as they are, since the kernel does not take
            them.
        """
        if _is_traced() or (torch.is_grad_enabled() and any(grad.requires_grad for grad in grads)):
            return [*range(len(grads))]
        if weights is None or rate == 0:
            weights, rate = grads, 0.0
        looks = [*forms(grads), *([] if weights is grads else forms(weights))]
        seen = [*looks, *axes, reproducible]
        roles = (grads, weights, grads)
        last, plan = self._last
        if seen != last:
            make = partial(_plan_in_place, roles, axes, reproducible)
            plan = _kept(self._plans, tuple(seen), make)
            self._last = seen, plan
        return sorted((*plan.left, *plan.run(roles, strength, rate)))


class _Plan:
    """The launches for a list of gradients: one `MultiTensor` for each device and dtype."""

    def __init__(
        self, roles: Roles, axes: Sequence[Axes], *, any_order: bool, left: Collection[int] = ()
    ) -> None:
        self.left = left
        places: dict[Hashable, list[int]] = {}
        for k in sorted({*range(len(axes))} - {*left}):
            kind = (roles[0][k].device, *(tensors[k].dtype for tensors in roles))
            places.setdefault(kind, []).append(k)
        self._parts = [
            (chosen, _multi_tensor(roles, axes, chosen, any_order=any_order))
            for chosen in places.values()
        ]

    def run(self, roles: Roles, strength: float, rate: float) -> list[int]:
        """Launch, and return the positions for which that could not be done."""
        left: list[int] = []
        for places, multi_tensor in self._parts:
            if not multi_tensor.run(_at(places, roles), strength=strength, rate=rate):
                left += places
        return left


launches = Launches()  # for all optimizers; a cache, as the plans are
_plans: dict[Hashable, _Plan] = {}  # a cache: it holds nothing that is not made anew when missing


def _kept(plans: dict[Hashable, _Plan], key: Hashable, make: Callable[[], _Plan]) -> _Plan:
    """Find a plan among the last ones, or make it."""
    plan = plans.pop(key, None) or make()
    plans[key] = plan  # what was used last goes to the end
    for oldest in list(plans)[:-_MOST_PLANS]:
        plans.pop(oldest, None)  # unless another thread has done so
    return plan


def _at(places: list[int], roles: Roles) -> Roles:
    if len(places) == len(roles[0]):
        return roles
    # A list in two roles stays one list.
    chosen = {id(tensors): [tensors[k] for k in places] for tensors in roles}
    return [chosen[id(tensors)] for tensors in roles]


def _multi_tensor(
    roles: Roles, axes: Sequence[Axes], places: list[int], *, any_order: bool
) -> MultiTensor:
    chosen = [axes[k] for k in places]
    return MultiTensor("centralize", _at(places, roles), chosen, any_order=any_order)


def _plan_in_place(roles: Roles, axes: Sequence[Axes], reproducible: bool) -> _Plan:
    """Plan without gradients that the kernel does not take, or would have in hand already."""
    grads, weights, _ = roles
    taken = [
        k
        for k, (grad, weight, fan_in) in enumerate(zip(grads, weights, axes, strict=True))
        if takes(grad, fan_in, grad) and (weight is grad or _goes_with(weight, grad))
    ]
    repeated = _repeated([grads[k] for k in taken])
    left = {*range(len(axes))} - {k for n, k in enumerate(taken) if n not in repeated}
    return _Plan(roles, axes, any_order=not reproducible, left=left)


def _repeated(tensors: Sequence[Tensor]) -> set[int]:
    """Positions of tensors that begin where an earlier one does."""
    addresses = [*map(Tensor.data_ptr, tensors)]
    if len(set(addresses)) == len(addresses):
        return set()
    return {k for k, address in enumerate(addresses) if address in addresses[:k]}


def _taken(
    grads: Sequence[Tensor], axes: Sequence[Axes], outs: Sequence[Tensor | None]
) -> list[int]:
    """Positions of gradients that `takes` takes; what they have in common is asked once."""
    if _is_traced():
        return []
    jobs = enumerate(zip(grads, axes, outs, strict=True))
    fitting = [k for k, job in jobs if _is_on_cuda(job[0]) and _fits(*job)]
    reasons = {device: why_not(device) for device in {grads[k].device for k in fitting}}
    return [k for k in fitting if not reasons[grads[k].device]]


def _fits(grad: Tensor, axes: Axes, out: Tensor | None) -> bool:
    """Whether the kernel can walk through a tensor, unseen by autograd."""
    return (
        not (torch.is_grad_enabled() and (grad.requires_grad or _is_recorded(out)))
        and _is_ordinary(grad)
        and _tiles.walks(grad, axes, any_order=False) is not None
        and (_is_dense(grad) if out is None else out is grad or _is_beside(grad, out))
    )


def _is_recorded(out: Tensor | None) -> bool:
    return out is not None and out.requires_grad


def _is_traced() -> bool:
    """Whether a compiler or a transformation wants to see the operations."""
    return (
        torch.compiler.is_compiling()
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack() > 0
        or vars(forward_ad)["_current_level"] >= 0
    )


def _target(grad: Tensor, out: Tensor | None) -> Tensor:
    return torch.empty_like(grad) if out is None else out


def _interfere(grads: Sequence[Tensor], outs: Sequence[Tensor | None]) -> bool:
    """Whether something is written to memory where another tensor lies, or may lie."""
    end = end_of_written = -inf
    for start, stop, is_written in sorted(_uses(grads, outs)):
        if start < (end if is_written else end_of_written):
            return True
        end = max(end, stop)
        end_of_written = max(end_of_written, stop) if is_written else end_of_written
    return False


def _uses(
    grads: Sequence[Tensor], outs: Sequence[Tensor | None]
) -> Iterator[tuple[float, float, bool]]:
    """Where tensors begin and end, and whether they are written to; new ones lie apart."""
    for grad, out in zip(grads, outs, strict=True):
        read = _span(grad)
        written = read if out is grad else None if out is None else _span(out)
        if written != read:
            yield *read, False
        if written is not None:
            yield *written, True


def _span(tensor: Tensor) -> tuple[float, float]:
    """Where a tensor begins and ends in the memory of the device; anywhere if that is unknown."""
    if type(tensor) not in _PLAIN:
        return -inf, inf
    if not _is_on_cuda(tensor):
        return inf, inf
    start = tensor.data_ptr()
    return start, start + _extent(tensor.shape, tensor.stride()) * tensor.itemsize


@lru_cache(maxsize=1 << 12)
def _extent(shape: tuple[int, ...], steps: tuple[int, ...]) -> int:
    """Count the elements from the first in memory to the last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))


def _is_on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and tensor.dtype in _DTYPES
        and not tensor.is_neg()
        and tensor.data_ptr() != 0  # as it is where zeros are not stored
    )


def _is_dense(grad: Tensor) -> bool:
    """Whether `torch.empty_like` gives a tensor of the same strides."""
    return _tiles.walks(grad, (), any_order=True) is not None


def _is_beside(grad: Tensor, out: Tensor) -> bool:
    apart = grad.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
    same_place = grad.data_ptr() == out.data_ptr()
    return _goes_with(out, grad) and out.dtype is grad.dtype and (apart or same_place)


def _goes_with(tensor: Tensor, grad: Tensor) -> bool:
    """Whether a tensor can be walked through along with a gradient."""
    return (
        _is_ordinary(tensor)
        and tensor.device == grad.device
        and tensor.shape == grad.shape
        and tensor.stride() == grad.stride()
        and (tensor.dtype is torch.float64) == (grad.dtype is torch.float64)
    )


@cache
def _lack(device: torch.device) -> str:
    """Tell what is missing for the kernel."""
    if torch.version.hip is not None:
        return "ROCm: the kernels are for CUDA"
    if torch.cuda.get_device_capability(device) < _OLDEST_DEVICE:
        return f"{torch.cuda.get_device_name(device)} is too old for Triton"
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install triton)"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"Triton {triton.__version__} is too old (pip install 'triton>={oldest}')"
    return "Triton interprets (TRITON_INTERPRET is set)" if triton.knobs.runtime.interpret else ""


@cache
def _failure(device: torch.device) -> str:
    """Tell how Triton fails here: it needs a compiler of C, for example."""
    try:
        with waiting():
            grad = torch.tensor([[1.0, 3.0]], device=device)
            kernel = MultiTensor("centralize", [[grad]] * 3, [(1,)], any_order=False)
            kernel.launch([[grad]] * 3, strength=1.0, rate=0.0)
            found = grad.tolist()
    except torch.OutOfMemoryError:  # there may be memory the next time
        raise
    except (TritonFailsError, ImportError, OSError, RuntimeError, ValueError) as error:
        return f"Triton fails: {str(error).strip().rpartition(chr(10))[2]}"
    return "" if found == [[-1.0, 1.0]] else "Triton computes something else here"
