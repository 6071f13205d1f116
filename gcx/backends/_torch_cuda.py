"""PyTorch on CUDA: a list of gradients is centralized in few launches, one for most models.

PyTorch's own operations handle the tensors that the kernels do not take. The driver is loaded with
the first tensor on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from gcx._memory import overlap
from gcx.backends._torch_driver import Driver
from gcx.backends._torch_dtensor import restore, see_all
from gcx.backends._torch_memory import PLAIN, FanIn, count_bytes
from gcx.backends.cuda import launcher
from gcx.backends.cuda.launcher import OLDEST_DEVICE, Launcher, Schedule, Traits
from gcx.backends.cuda.tables import Axes, find_walk, is_dense

_private_error: Exception | None = None
try:  # these names are private, so a release of torch may lack one
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack
    from torch._C._dynamo.guards import TensorGuards
    from torch._C._functorch import peek_interpreter_stack

    vars(forward_ad)["_current_level"]
except (ImportError, KeyError) as error:
    _private_error = error

T = TypeVar("T")
Roles = Sequence[Sequence[Tensor | None]]  # see `Launches`

_NAMES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64")}
_MOST_LISTS = 128  # an optimizer has one for each parameter group
_is_on_cuda = attrgetter("is_cuda")


def why_not(device: torch.device) -> str:
    """Say why the kernels do not run on a CUDA device; empty if they do."""
    if torch.version.hip is not None:
        return "ROCm: the kernels are for CUDA"
    if torch.cuda.get_device_capability(device) < OLDEST_DEVICE:
        return f"{torch.cuda.get_device_name(device)} is too old for the kernels"
    found = find_launcher()
    return found if isinstance(found, str) else found.failures.get(device.index, "")


@cache
def find_launcher() -> Launcher | str:
    """Load the driver; the reason if it is not there."""
    return launcher.find_launcher(_make_driver)


def _make_driver() -> Driver:
    if _private_error is not None:
        raise _private_error
    return Driver()


def launch(
    grads: Sequence[Tensor],
    fan_ins: Sequence[FanIn],
    strength: float,
    outs: Sequence[Tensor | None],
    *,
    reproducible: bool,
    decay: tuple[Sequence[Tensor], float] | None = None,
) -> list[Tensor | None]:
    """Centralize the tensors that the kernels take, or their parts on this process.

    A fan-in is a shape, which may split axes of the tensor, and its axes. With weights and the rate
    of their decay, the means are of ``grad + rate * weight``. The result is None for each tensor
    that is left to PyTorch. All are left if a result would overwrite a gradient before it is read.
    """
    if is_traced():
        return [None] * len(grads)
    seen = see_all(grads, fan_ins, grads)
    parts: Sequence[Tensor | None] = seen
    if outs[0] is None:  # as are all then
        parts = outs
    elif not all(map(is_, outs, grads)):
        parts = see_all(cast("Sequence[Tensor]", outs), fan_ins, grads)
    roles, rule, rate = [seen, parts], "Store", 0.0
    if decay is not None:
        weights, rate = decay
        roles, rule = [seen, parts, see_all(weights, fan_ins, grads)], "StoreRate"
    launches = find_launches(rule, roles, [axes for _, axes in fan_ins], reproducible)
    done = launches.run(roles, (strength, rate))
    for k, (result, out) in enumerate(zip(done, outs, strict=True)):
        if result is not None and out is not None:
            done[k] = out
        elif result is not None and seen[k] is not grads[k]:
            done[k] = restore(result, grads[k])
    return done


def find_launches(rule: str, roles: Roles, axes: Sequence[Axes], reproducible: bool) -> Launches:
    """Find the launches for tensors in these forms among the latest ones, or make them."""
    in_place, is_new = roles[1] is roles[0], roles[1][0] is None
    key = (rule, reproducible, tuple(axes), in_place, is_new)
    tensors = [x for role in roles[in_place:] for x in role if x is not None]
    if (found := recall(key, tensors)) is None:
        remember(key, tensors, found := Launches(rule, roles, axes, reproducible))
    return found  # type: ignore[no-any-return]


_recent: dict[Hashable, tuple[tuple[TensorGuards, Any], ...]] = {}  # a cache


def recall(key: Hashable, tensors: Sequence[Tensor]) -> Any:
    """Find the object that `remember` kept for this number of tensors in these forms, or None.

    The guards of torch.compile check a whole list in one call: types, devices, dtypes, shapes,
    strides, negation, and whether autograd watches.
    """
    for guards, found in _recent.get((key, len(tensors)), ()):
        if guards.check(*tensors):
            return found
    return None


def remember(key: Hashable, tensors: Sequence[Tensor], found: object) -> None:
    """Keep an object for `recall`."""
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    key = key, len(tensors)
    _recent[key] = ((guards, found), *_recent.get(key, ()))[:_MOST_LISTS]
    for oldest in [*_recent][:-_MOST_LISTS]:
        _recent.pop(oldest, None)  # another thread may have removed it


class Launches:
    """The launches of a rule for tensors in one form: types, devices, dtypes, shapes, strides.

    The roles are lists of tensors: gradients, results (None for a new one), and the others of the
    rule. Gradients that the kernels do not take are left out.
    """

    def __init__(self, rule: str, roles: Roles, axes: Sequence[Axes], reproducible: bool) -> None:
        self._places, arrays = [], []
        for k, (grad, *others) in enumerate(zip(*roles, strict=True)):
            assert grad is not None
            beside = [x for x in others if x is not None and x is not grad]
            traits = see(grad, axes[k], *beside, reproducible=reproducible)
            # A new result has the strides of the gradient only if that is dense.
            if traits and (others[0] is not None or is_dense(grad.shape, grad.stride())):
                self._places.append(k)
                arrays.append(traits)
        grads = cast("list[Tensor]", pick(self._places, roles[0]))
        self.is_whole = len(grads) == len(roles[0])
        self._sizes = [*map(count_bytes, grads)]
        self._is_new = roles[1][0] is None
        self._apart: list[int] = []  # the last addresses that did not overlap
        if arrays:
            found = find_launcher()
            assert isinstance(found, Launcher)  # `see` has asked
            self._schedule = Schedule(found, rule, arrays)

    def run(self, roles: Roles, numbers: Sequence[float]) -> list[Tensor | None]:
        """Launch for tensors in the forms for which this was made; return the results.

        None stands for a tensor that is left to PyTorch: all of them are if two share memory.
        """
        results: list[Tensor | None] = [None] * len(roles[0])
        places = self._places
        if not places:
            return results
        chosen: list[Any] = [*roles] if self.is_whole else [pick(places, role) for role in roles]
        if self._is_new:
            chosen[1] = [*map(torch.empty_like, chosen[0])]
        if in_place := roles[1] is roles[0]:
            del chosen[1]
        addresses = [[*map(Tensor.data_ptr, tensors)] for tensors in chosen]
        every = [*chain(*addresses)]
        # At 0 is memory that FSDP has freed, or that was never there.
        if 0 in every or not (self._is_new or self._are_apart(every)):
            return results
        left = self._schedule.run(addresses[:in_place] + addresses, numbers)
        done = [n for n in range(len(places)) if n not in left]
        written = pick(done, chosen[not in_place])
        increment_version(written)
        for n, result in zip(done, written, strict=True):
            results[places[n]] = result
        return results

    def _are_apart(self, starts: list[int]) -> bool:
        if starts != self._apart:
            if overlap(starts, self._sizes * (len(starts) // len(self._sizes))):
                return False
            self._apart = starts
        return True


class Call(NamedTuple):
    """A call of `gcx.centralize_many` with a list, in place or for new results.

    If an earlier call had the same form, nothing has to be checked again.
    """

    centralize: Callable[..., Tensor]  # of the backend
    grads: list[Any]
    layouts: object
    is_in_place: bool
    reproducible: bool

    def remember(self, axes: Sequence[Axes]) -> None:
        """Keep the fan-in axes of each gradient for the next call; none for one left alone."""
        places = [k for k, fan_in in enumerate(axes) if fan_in]
        if not places or is_traced() or not all(map(_is_ordinary, self.grads)):
            return
        fan_ins = pick(places, axes)
        launches = find_launches("Store", self._find_roles(places), fan_ins, self.reproducible)
        if launches.is_whole:  # the layouts are kept, so that no other object has their id
            remember(self._find_key(), self.grads, (self.layouts, places, fan_ins, launches))

    def repeat(self, strength: float) -> list[Any] | None:
        """Centralize the gradients if a call of `remember` has the answers; else return None."""
        known = None if is_traced() else recall(self._find_key(), self.grads)
        if known is None:
            return None
        _, places, fan_ins, launches = known
        grads, outs = roles = self._find_roles(places)
        done = launches.run(roles, (strength, 0.0))
        left = [n for n, result in enumerate(done) if result is None]
        if len(left) == len(done):
            return None
        for n in left:
            done[n] = self.centralize(grads[n], fan_ins[n], strength, outs[n], self.reproducible)
        results = [*self.grads]
        for k, result in zip(places, done, strict=True):
            results[k] = result
        return results

    def _find_key(self) -> Hashable:
        return id(self.layouts), self.is_in_place, self.reproducible

    def _find_roles(self, places: Sequence[int]) -> list[Sequence[Any]]:
        grads = pick(places, self.grads)
        return [grads, grads if self.is_in_place else [None] * len(grads)]


def _is_ordinary(x: Tensor) -> bool:
    """Return True if the form of a tensor shows all that is checked; a list may hold anything."""
    return type(x) in PLAIN and x.layout is torch.strided and _is_on_cuda(x)


def see(grad: Tensor, axes: Axes, *beside: Tensor, reproducible: bool = False) -> Traits | None:
    """See a tensor as the kernels do, with those `beside` it; None if they do not take it.

    A tensor without axes is not centralized, but a part of an optimizer's step.
    """
    is_recorded = torch.is_grad_enabled()
    for x in (grad, *beside):
        if type(x) not in PLAIN or x.layout is not torch.strided or x.is_neg():
            return None
        if (is_recorded and x.requires_grad) or x.shape != grad.shape or x.dtype != grad.dtype:
            return None
        if x.stride() != grad.stride() or x.device != grad.device:
            return None
    name = _NAMES.get(grad.dtype)
    if name is None or not _is_on_cuda(grad) or why_not(grad.device):
        return None
    walk = find_walk(grad.shape, grad.stride(), axes, any_order=not reproducible)
    return walk and (grad.get_device(), name, walk)


def pick(places: Sequence[int], values: Sequence[T]) -> Sequence[T]:
    return values if len(places) == len(values) else [values[k] for k in places]


def is_traced() -> bool:
    """Return True if a compiler or a transformation records operations, or if torch cannot tell."""
    if _private_error is not None:
        find_launcher()  # which warns once
        return True
    return (
        torch.compiler.is_compiling()
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack() > 0
        or vars(forward_ad)["_current_level"] >= 0
    )
