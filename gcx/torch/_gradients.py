"""The gradients of a model, centralized now, or while backward computes them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from gcx._decisions import refuse_empty
from gcx._names import naming
from gcx._options import Layers, Options
from gcx.backends import _torch
from gcx.backends._torch_dtensor import is_dtensor
from gcx.plan import Plan
from gcx.torch._plan import HINT, Decision, Overrides, decide
from gcx.torch._step import find_owner, not_compiled, warn
from gcx.torch._weights import Weak, Weight, centralize_, part_gradients, weights_of, with_gradient

# Passes after which a weight without a gradient is reported; or changes of one without any.
_PASSES = 8


@not_compiled
@torch.no_grad()
def centralize_grads_(
    model: nn.Module,
    *,
    strength: float = 1.0,
    layers: Layers = "all",
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> None:
    """Centralize the gradients of a model now, in place in ``.grad``.

    It is for loops that clip the norm of centralized gradients, say. With `centralize`, whose
    handle has a method of this name, the step does it again: that includes weight decay, and else
    changes nothing at full strength.

    Parameters
    ----------
    model : torch.nn.Module
        The model, after ``backward()``. Parameters without a gradient are passed over. Give the
        whole model: a part does not show which of its parameters other layers share.
    strength, layers, overrides, reproducible
        As in `centralize`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `centralize`; if there is no gradient to centralize, or one is sparse.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> model(torch.rand(8, 3)).square().sum().backward()
    >>> gcx.torch.centralize_grads_(model)
    >>> bool(model.weight.grad.sum(1).abs().max() < 1e-5)
    True
    >>> norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    """
    options = Options("gradient", None, strength, layers, overrides, reproducible)
    decisions = decide(model, options)
    weights = weights_of(decisions.items(), reproducible=reproducible)
    centralize_gradients([*weights], decisions, options.strength)


def centralize_gradients(
    weights: Sequence[Weight], parameters: Iterable[Tensor], strength: float
) -> None:
    part_gradients(weights, parameters)
    weights, grads = with_gradient(weights)
    if not grads:
        raise ValueError(
            "there is no gradient to centralize; call backward() first, and see gcx.torch.plan"
        )
    centralize_(weights, grads, None, strength)


def centralize_in_backward(
    model: nn.Module,
    *,
    strength: float = 1.0,
    layers: Layers = "all",
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> CentralizationInBackward:
    """Let backward centralize the gradients of a model, from its next forward pass on.

    It is for wrappers that flatten parameters, or update them without a step (FSDP1, DeepSpeed
    ZeRO). Otherwise prefer `centralize`, which also handles weight decay and momentum. Layers that
    are added later are not covered. A copy of the model centralizes, without a handle.

    Parameters
    ----------
    model : torch.nn.Module
        The model, before it is wrapped: while its weights have the shapes of their layers.
    strength, layers, overrides, reproducible
        As in `centralize`.

    Returns
    -------
    CentralizationInBackward
        A handle: ``.plan`` shows the decision on each parameter, ``.remove()`` ends it.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `centralize`; if the model has such a handle already; in backward, if the gradient of a
        weight is sparse. :doc:`/torch_distributed` tells the limits, and the warnings.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> gcx.torch.centralize_in_backward(model)
    <CentralizationInBackward of Linear, <gcx plan: 1 of 2 parameters centralized>>
    >>> model(torch.rand(8, 3)).square().sum().backward()
    >>> bool(model.weight.grad.sum(1).abs().max() < 1e-5)
    True
    """
    options = Options("gradient", None, strength, layers, overrides, reproducible)
    return CentralizationInBackward(model, options)


class CentralizationInBackward:
    """Gradient Centralization at work in backward; `gcx.torch.centralize_in_backward` returns it.

    ``.plan``, a `gcx.plan.Plan`, is the decision on each parameter of the model.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        decisions = decide(model, options)
        self._kind = type(model).__name__
        self.plan: Plan = Plan(decision.row for decision in decisions.values())
        weights = weights_of(decisions.items(), reproducible=options.reproducible)
        self._places = [_Place(w, decisions[w.parameter], options.strength) for w in weights]
        refuse_empty(self.plan, f"this {self._kind}", hint=HINT)
        if find_owner(vars(model)["_forward_pre_hooks"], CentralizationInBackward):
            raise ValueError(
                f"this {self._kind} is centralized in backward already; .remove() that first"
            )
        self._passes = 0
        self._changes = 0  # of the first weight, by a few of its elements
        self._last: Tensor | None = None
        self._hooked: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()
        self._hooks = [model.register_forward_pre_hook(self._count)]
        # On the modules around a layer too: MultiheadAttention uses the weight of a child without
        # calling the child.
        for module in model.modules():
            inside = {*module.modules()}
            if places := [place for place in self._places if place.holder() in inside]:
                hook = partial(self._before_forward, places)
                self._hooks.append(module.register_forward_pre_hook(hook))
        self._before_forward(self._places)

    def remove(self) -> None:
        """Leave the model as it was before; a second time does nothing."""
        if self._hooks and self._passes < _PASSES:
            self._warn_of_idle()
        for hook in (*self._hooks, *self._hooked.values()):
            hook.remove()
        self._hooks.clear()
        self._hooked.clear()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._kind}, {self.plan!r}>"

    @not_compiled
    def _before_forward(self, places: list[_Place], *_: Any) -> None:
        for place in places:
            tensor = place.tensor()
            if tensor is not None and tensor not in self._hooked:
                self._hooked[tensor] = tensor.register_hook(place.centralize)  # type: ignore[no-untyped-call]

    @not_compiled
    def _count(self, model: nn.Module, *_: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        inside = {*model.modules()}
        if gone := [place for place in self._places if place.holder() not in inside]:
            self._places = [place for place in self._places if place.holder() in inside]
            warn(
                f"the layer of {gone[0].name} was replaced or removed, and backward centralizes no "
                "layer that came later; .remove() this handle, and call centralize_in_backward anew"
            )
        if self._passes == _PASSES:
            return
        # Not before the first backward: an unrolled cell makes many passes.
        if any(place.has_seen_one for place in self._places):
            self._passes += 1
            if self._passes == _PASSES:
                self._warn_of_idle()
        elif self._count_changes() == _PASSES:
            self._passes = _PASSES
            warn(
                f"no gradient of this {self._kind} was there to centralize, while its weights "
                "changed: backward does not reach them, or the loop computes gradients by itself"
            )

    def _count_changes(self) -> int:
        """Look at the first weight that is there; return the number of its changes so far."""
        weights = (place.tensor() for place in self._places)
        weight = next((weight for weight in weights if weight is not None), None)
        if weight is None or is_functorch_wrapped_tensor(weight):
            return 0
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return 0
        here = weight.to_local() if is_dtensor(weight) else weight
        now = here.detach().reshape(-1)[:64].clone()
        with suppress(RuntimeError):  # on the meta device there are no values
            self._changes += self._last is not None and not torch.equal(now, self._last)
        self._last = now
        return self._changes

    def _warn_of_idle(self) -> None:
        unseen = [place for place in self._places if not place.has_seen_one]
        idle = [place.name for place in unseen if place.find_trained() is not None]
        if idle and len(unseen) < len(self._places):
            warn(
                f"no gradient of {len(idle)} weights ({idle[0]}, ...) was there to centralize, "
                "while those of others were: the loss does not depend on them, or they are used "
                "outside the forward of the layers around them; leave such weights out by overrides"
            )

    def __getstate__(self) -> dict[str, Any]:
        # For copies of the model, without the hooks on its tensors.
        return {**vars(self), "_hooked": None, "_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _hooked=WeakIdKeyDictionary())


class _Place:
    """The attribute of a layer that is its weight in the forward pass.

    It is the parameter itself, under FSDP1 a view of the flat parameter, and under FSDP2 the
    gathered parameter.
    """

    def __init__(self, weight: Weight, decision: Decision, strength: float) -> None:
        assert decision.holder is not None
        self.holder, self._key = Weak(decision.holder), decision.key
        self.name, self.has_seen_one = weight.name, False
        # Without the parameter, whose memory a wrapper may want to free.
        self._weight, self._shape = weight._replace(parameter=torch.empty(0)), decision.row.shape
        self._strength = strength

    def find_trained(self) -> Tensor | None:
        """Return the tensor if it is trained, in any shape."""
        found = getattr(self.holder(), self._key, None)
        return found if isinstance(found, Tensor) and found.requires_grad else None

    def tensor(self) -> Tensor | None:
        """Return the tensor if it has the shape of the weight, and will get a gradient."""
        found = self.find_trained()
        if found is None or found.shape != self._shape:
            return None
        # FSDP1 may have freed the storage of a view from an earlier pass; touching it would raise.
        is_plain = type(found) is Tensor and not is_functorch_wrapped_tensor(found)
        return None if is_plain and not found.untyped_storage().nbytes() else found

    def centralize(self, grad: Tensor) -> Tensor:
        """Return a centralized gradient; a hook of the tensor."""
        self.has_seen_one = True
        with naming(self.name):
            _torch.check_dtype(grad)
        self._weight.check(grad)
        _, _, fan_in, reproducible = self._weight
        return _torch.centralize_over(grad, fan_in, self._strength, reproducible)
