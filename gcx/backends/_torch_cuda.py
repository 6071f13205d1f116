"""PyTorch on CUDA: a list of gradients is centralized in one launch of a Triton kernel per dtype.

PyTorch's own operations handle the tensors that the kernel does not take. Triton is imported with
the first tensor on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import cache, partial
from math import inf

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from gcx.backends import _tiles
from gcx.backends._memory import extent, is_dense, writes_conflict
from gcx.backends._tiles import Axes
from gcx.backends._torch_triton import (
    MultiTensor,
    Roles,
    TritonFailsError,
    allow_sync,
    failures,
    forms,
)

_OLDEST_TRITON = (3, 5)
_OLDEST_DEVICE = (8, 0)  # that Triton supports
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = (Tensor, Parameter)
_MOST_SCHEDULES = 16


def why_not(device: torch.device | None = None) -> str:
    """Say why the kernel does not run on a CUDA device, by default the current one.

    The answer is empty if it does. The first call for a device tries the kernel.
    """
    if device is None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        device = torch.device("cuda", torch.cuda.current_device())
    reason = _find_lack(device) or failures.get(device, "")
    if reason or torch.cuda.is_current_stream_capturing():  # a capture allows no trial
        return reason
    return _try_kernel(device)


def takes(grad: Tensor, axes: Axes, out: Tensor | None = None) -> bool:
    """Return True if the kernel can process a tensor with these fan-in axes, or with none.

    It takes ordinary tensors on a CUDA device, of the dtypes and strides that it supports. It takes
    none while autograd or a compiler records operations. `out` is `grad`, or has the same strides
    and shares no memory with it.
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
    """Centralize the gradients that the kernel takes; see `gcx.backends.Backend`.

    The result is None for each gradient that is left to PyTorch. All are left if a result would
    overwrite another array of the list.
    """
    results: list[Tensor | None] = [None] * len(grads)
    places = _find_taken(grads, axes, outs)
    if not places or (len(grads) > 1 and writes_conflict(grads, outs, _find_span)):
        return results
    chosen = [grads[k] for k in places]
    wanted = [outs[k] for k in places]
    targets = [
        torch.empty_like(grad) if out is None else out
        for grad, out in zip(chosen, wanted, strict=True)
    ]
    fan_ins = [axes[k] for k in places]
    roles = (chosen, chosen, targets)
    make = partial(Schedule, "centralize", roles, fan_ins, any_order=not reproducible)
    schedule = _recall(_schedules, (*forms(chosen), *fan_ins, reproducible), make)
    left = schedule.run(roles, strength=strength, rate=0.0)
    for n, k in enumerate(places):
        results[k] = None if n in left else targets[n]
    return results


class Launches:
    """Centralizes lists of gradients in place; keeps the tables of lists that it has seen."""

    def __init__(self) -> None:
        self._schedules: dict[Hashable, Schedule] = {}
        # The last list: comparing it is faster than hashing. One value, since threads share it.
        self._last: tuple[object, Schedule] = (
            None,
            Schedule("centralize", ((), (), ()), (), any_order=True),
        )

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
        """Subtract from each gradient `strength` times its mean and `rate` times its weight's mean.

        The gradients are on any devices, and do not overlap in memory. `rate` is for example the
        weight decay that an optimizer adds to the gradient, times `strength`. Returns the positions
        of the gradients that the kernel does not take, and leaves as they are.
        """
        if _is_traced() or (torch.is_grad_enabled() and any(grad.requires_grad for grad in grads)):
            return [*range(len(grads))]
        if weights is None or rate == 0:
            weights, rate = grads, 0.0
        roles = (grads, weights, grads)
        of_weights = [] if weights is grads else forms(weights)
        key = [*forms(grads), *of_weights, *axes, reproducible]
        last, schedule = self._last
        if key != last:
            make = partial(_schedule_in_place, roles, axes, reproducible)
            schedule = _recall(self._schedules, tuple(key), make)
            self._last = key, schedule
        return schedule.run(roles, strength=strength, rate=rate)


class Schedule:
    """The launches of a rule for lists of tensors: one `MultiTensor` for each device and dtype.

    The positions in `left` are left out of all launches.
    """

    def __init__(
        self,
        rule: str,
        roles: Roles,
        axes: Sequence[Axes],
        *,
        any_order: bool,
        left: Collection[int] = (),
    ) -> None:
        self._left = left
        places: dict[Hashable, list[int]] = {}
        for k in sorted({*range(len(axes))} - {*left}):
            kind = (roles[0][k].device, *(tensors[k].dtype for tensors in roles))
            places.setdefault(kind, []).append(k)
        self._parts = []
        for chosen in places.values():
            here, fan_ins = _select(chosen, roles), [axes[k] for k in chosen]
            kernel = MultiTensor(rule, here, fan_ins, any_order=any_order)
            self._parts.append((chosen, kernel))

    def run(self, roles: Roles, **scalars: float) -> list[int]:
        """Launch, and return the positions that are left: none of their tensors has changed."""
        left = [*self._left]
        for places, multi_tensor in self._parts:
            if not multi_tensor.run(_select(places, roles), **scalars):
                left += places
        return sorted(left)


launches = Launches()  # for all optimizers; a cache, as the schedules are
_schedules: dict[Hashable, Schedule] = {}  # a cache


def _recall(
    schedules: dict[Hashable, Schedule], key: Hashable, make: Callable[[], Schedule]
) -> Schedule:
    """Find a schedule among the latest ones, or make it."""
    schedule = schedules.pop(key, None) or make()
    schedules[key] = schedule  # at the end: the first is the one that was used least recently
    for oldest in list(schedules)[:-_MOST_SCHEDULES]:
        schedules.pop(oldest, None)  # another thread may have removed it
    return schedule


def _select(places: list[int], roles: Roles) -> Roles:
    if len(places) == len(roles[0]):
        return roles
    # A list in two roles stays one list.
    chosen = {id(tensors): [tensors[k] for k in places] for tensors in roles}
    return [chosen[id(tensors)] for tensors in roles]


def _schedule_in_place(roles: Roles, axes: Sequence[Axes], reproducible: bool) -> Schedule:
    """Exclude gradients that the kernel cannot take, and repetitions of an earlier gradient."""
    grads, weights, _ = roles
    taken = [
        k
        for k, (grad, weight, fan_in) in enumerate(zip(grads, weights, axes, strict=True))
        if takes(grad, fan_in, grad) and (weight is grad or _is_parallel(weight, grad))
    ]
    repeats = _find_repeats([grads[k] for k in taken])
    left = {*range(len(axes))} - {k for n, k in enumerate(taken) if n not in repeats}
    return Schedule("centralize", roles, axes, any_order=not reproducible, left=left)


def _find_repeats(tensors: Sequence[Tensor]) -> set[int]:
    """Find the positions of tensors that begin at the address of an earlier one."""
    addresses = [*map(Tensor.data_ptr, tensors)]
    if len(set(addresses)) == len(addresses):
        return set()
    return {k for k, address in enumerate(addresses) if address in addresses[:k]}


def _find_taken(
    grads: Sequence[Tensor], axes: Sequence[Axes], outs: Sequence[Tensor | None]
) -> list[int]:
    """Find the positions of the gradients that `takes` takes; each device is checked once."""
    if _is_traced():
        return []
    jobs = enumerate(zip(grads, axes, outs, strict=True))
    fitting = [k for k, job in jobs if _is_on_cuda(job[0]) and _fits(*job)]
    reasons = {device: why_not(device) for device in {grads[k].device for k in fitting}}
    return [k for k in fitting if not reasons[grads[k].device]]


def _fits(grad: Tensor, axes: Axes, out: Tensor | None) -> bool:
    """Return True if the kernel supports a tensor, and autograd does not record it."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (grad, out)):
        return False
    if not _is_ordinary(grad) or _tiles.find_walk(grad, axes, any_order=False) is None:
        return False
    if out is None:  # the result will have the strides of the gradient only if that is dense
        return is_dense(grad.shape, grad.stride())
    return out is grad or _is_beside(grad, out)


def _is_traced() -> bool:
    """Return True if a compiler or a transformation records operations."""
    return (
        torch.compiler.is_compiling()
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack() > 0
        or vars(forward_ad)["_current_level"] >= 0
    )


def _find_span(tensor: Tensor) -> tuple[float, float]:
    """Find the addresses of a tensor on the device; all of them if they are unknown."""
    if type(tensor) not in _PLAIN:
        return -inf, inf
    if not _is_on_cuda(tensor):
        return inf, inf
    start, itemsize = tensor.data_ptr(), tensor.itemsize
    strides = tuple([step * itemsize for step in tensor.stride()])
    return start, start + extent(tensor.shape, strides, itemsize)[1]


def _is_on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and tensor.dtype in _DTYPES
        and not tensor.is_neg()
        and tensor.data_ptr() != 0  # as in a tensor of zeros that are not stored
    )


def _is_beside(grad: Tensor, out: Tensor) -> bool:
    apart = grad.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
    same_place = grad.data_ptr() == out.data_ptr()
    return _is_parallel(out, grad) and out.dtype is grad.dtype and (apart or same_place)


def _is_parallel(tensor: Tensor, grad: Tensor) -> bool:
    """Return True if the kernel can read a tensor at the same offsets as a gradient."""
    return (
        _is_ordinary(tensor)
        and tensor.device == grad.device
        and tensor.shape == grad.shape
        and tensor.stride() == grad.stride()
        and (tensor.dtype is torch.float64) == (grad.dtype is torch.float64)
    )


@cache
def _find_lack(device: torch.device) -> str:
    """Name a missing requirement of the kernel; empty if there is none."""
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
def _try_kernel(device: torch.device) -> str:
    """Try the kernel, and say how it fails: it may lack a C compiler, for example."""
    try:
        with allow_sync():
            grad = torch.tensor([[1.0, 3.0]], device=device)
            kernel = MultiTensor("centralize", [[grad]] * 3, [(1,)], any_order=False)
            kernel.launch([[grad]] * 3, strength=1.0, rate=0.0)
            found = grad.tolist()
    except torch.OutOfMemoryError:  # the next try may find memory
        raise
    except (TritonFailsError, ImportError, OSError, RuntimeError, ValueError) as error:
        return f"Triton fails: {str(error).strip().rpartition(chr(10))[2]}"
    return "" if found == [[-1.0, 1.0]] else "Triton computes something else here"
