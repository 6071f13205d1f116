"""PyTorch on CUDA: lists of gradients, centralized in one launch of a Triton kernel for each dtype.

What the kernel does not take, PyTorch's own operations do. Triton is imported when the first tensor
on a CUDA device arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import cache, partial
from subprocess import SubprocessError

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from gcx.backends import _tiles
from gcx.backends._tiles import Axes
from gcx.backends._torch_triton import MultiTensor, Roles, forms

__all__ = ["Launches", "MultiTensor", "centralize_many", "takes", "why_not"]

_OLDEST_TRITON = (3, 5)
_OLDEST_DEVICE = (8, 0)  # that Triton supports
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = (Tensor, Parameter)
_MOST_PLANS = 64


def why_not(device: torch.device | None = None) -> str:
    """Tell why tensors on a CUDA device, by default the current one, are left to PyTorch.

    The answer is empty if they are not. The first time for a device, the kernel is tried.
    """
    if device is None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        device = torch.device("cuda", torch.cuda.current_device())
    return _lack(device) or ("" if torch.cuda.is_current_stream_capturing() else _failure(device))


def takes(grad: Tensor, axes: Axes, out: Tensor | None = None) -> bool:
    """Whether a tensor, with these fan-in axes or none, is one for the kernel.

    It takes ordinary tensors on a CUDA device, of dtypes and strides that it knows, while nobody
    wants to see what is done with them, as autograd and compilers do. `out`, if it is not `grad`,
    has the same strides and lies apart.
    """
    return (
        _is_on_cuda(grad)
        and not _is_watched((grad,) if out is None else (grad, out))
        and _is_ordinary(grad)
        and _tiles.walks(grad, axes, any_order=False) is not None
        and (_is_dense(grad) if out is None else out is grad or _is_beside(grad, out))
        and not why_not(grad.device)
    )


def centralize_many(
    grads: Sequence[Tensor],
    axes: Sequence[Axes],
    strength: float,
    outs: Sequence[Tensor | None],
    reproducible: bool = False,
) -> list[Tensor]:
    """Centralize gradients that `takes` takes, each with its `out`; see `gcx.backends.Backend`."""
    results = [torch.empty_like(g) if o is None else o for g, o in zip(grads, outs, strict=True)]
    if _repeated(results):  # then one after the other
        for grad, fan_in, result in zip(grads, axes, results, strict=True):
            centralize_many([grad], [fan_in], strength, [result], reproducible)
        return results
    key = (*forms(grads), *axes, reproducible)
    roles = (grads, grads, results)
    make = partial(_Plan, roles, axes, any_order=not reproducible)
    _kept(_plans, key, make).run(roles, strength, 0.0)
    return results


class Launches:
    """Centralizes lists of gradients in place, fast where lists are alike from call to call."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, _Plan] = {}
        self._seen: object = None
        self._plan = _Plan(((), (), ()), (), any_order=True)  # of nothing

    def centralize_(
        self,
        grads: Sequence[Tensor],
        axes: Sequence[Axes],
        weights: Sequence[Tensor] | None = None,
        rate: float = 0.0,
        *,
        reproducible: bool = False,
    ) -> list[int]:
        """Subtract from each gradient its mean, and `rate` times the mean of its weight.

        Parameters
        ----------
        grads : sequence of Tensor
            Gradients, on any devices; no two of them share memory.
        axes : sequence of tuple of int
            The fan-in axes of each.
        weights : sequence of Tensor, optional
            The weight of each, of the same shape.
        rate : float, optional
            Such as the weight decay that an optimizer adds to the gradient.
        reproducible : bool, optional
            Whether to sum in the order of the axes, whatever the order of memory is.

        Returns
        -------
        list of int
            Positions of the gradients that are left as they are, since the kernel does not take
            them.
        """
        if _is_watched(grads):
            return [*range(len(grads))]
        if weights is None or rate == 0:
            weights, rate = grads, 0.0
        looks = [*forms(grads), *([] if weights is grads else forms(weights))]
        seen = [*looks, *axes, reproducible]
        roles = (grads, weights, grads)
        if seen != self._seen:
            make = partial(_plan_in_place, roles, axes, reproducible)
            self._plan, self._seen = _kept(self._plans, tuple(seen), make), seen
        self._plan.run(roles, 1.0, rate)
        return sorted(self._plan.left)


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

    def run(self, roles: Roles, strength: float, rate: float) -> None:
        for places, multi_tensor in self._parts:
            multi_tensor.run(_at(places, roles), strength=strength, rate=rate)


_plans: dict[Hashable, _Plan] = {}  # a cache: it holds nothing that is not made anew when missing


def _kept(plans: dict[Hashable, _Plan], key: Hashable, make: Callable[[], _Plan]) -> _Plan:
    """Find a plan among the last ones, or make it."""
    plan = plans.pop(key, None) or make()
    plans[key] = plan  # what was used last goes to the end
    if len(plans) > _MOST_PLANS:
        del plans[next(iter(plans))]
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


def _is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody wants to see the operations: a compiler, a transformation, autograd."""
    return (
        torch.compiler.is_compiling()
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack() > 0
        or vars(forward_ad)["_current_level"] >= 0
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


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
    from triton.errors import TritonError

    grad = torch.tensor([[1.0, 3.0]], device=device)
    try:
        centralize_many([grad], [(1,)], 1.0, [grad])
    except (TritonError, ImportError, OSError, RuntimeError, SubprocessError) as error:
        return f"Triton fails: {str(error).strip().rpartition(chr(10))[2]}"
    return "" if grad.tolist() == [[-1.0, 1.0]] else "Triton computes something else here"
