"""Gradient Centralization for an optimizer."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from gcx._decisions import already_attached
from gcx._frameworks import describe
from gcx._options import Decay, Layers, Options, Where
from gcx.plan import Plan
from gcx.torch._gradients import centralize_gradients
from gcx.torch._optimizer import inner_optimizer, step_of
from gcx.torch._plan import Overrides
from gcx.torch._step import (
    GradientHooks,
    UpdateHooks,
    find_owner,
    keep_switches,
    not_compiled,
    warn,
    warn_of_copies,
)
from gcx.torch._weights import IN_BACKWARD, Targets


def centralize(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    where: Where = "gradient",
    decay: Decay = None,
    strength: float = 1.0,
    layers: Layers = "all",
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> GradientCentralization:
    r"""Let an optimizer use Gradient Centralization from its next step on.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimizer; use it as before. A parameter group with ``"centralize": False`` is left
        alone.
    model : torch.nn.Module
        The model that holds every parameter of the optimizer. Its layers declare the fan-in.
    where : {"gradient", "update"}, optional
        ``"gradient"`` centralizes what the optimizer uses as the gradient, in place in ``.grad``;
        ``"update"`` the displacement of the weights by the step, which keeps their means.
    decay : {"inside", "outside"}, optional
        Whether weight decay is projected too. By default it is, except for decoupled decay (AdamW,
        Muon) with ``where="gradient"``. Optimizers of other packages need it.
    strength : float, optional
        The part of the mean to subtract, from 0 to 1.
    layers, overrides
        As in `plan`.
    reproducible : bool, optional
        Whether means have :doc:`equal bits </reproducible>` on every device.

    Returns
    -------
    GradientCentralization
        A handle: ``.plan`` shows the decision on each parameter, ``.remove()`` ends it.
        `centralized` finds it again.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If optimizer, model and options do not fit, or nothing would be centralized; in a step, for
        parameters that were added or replaced. :doc:`/torch` lists all cases, and the warnings.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> gcx.torch.centralize(optimizer, model)
    <GradientCentralization of SGD, where='gradient', <gcx plan: 1 of 2 parameters centralized>>
    >>> start = model.weight.mean().item()
    >>> model(torch.rand(8, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> abs(model.weight.mean().item() - start) < 1e-6
    True
    """
    options = Options(where, decay, strength, layers, overrides, reproducible)
    return GradientCentralization(optimizer, model, options)


class GradientCentralization:
    """Gradient Centralization at work in an optimizer; `gcx.torch.centralize` returns it."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, options: Options) -> None:
        optimizer = _find_optimizer(optimizer)
        _check_steps(optimizer)
        self._kind = type(optimizer).__name__
        if centralized(optimizer) is not None:
            remedy = "gcx.torch.centralized(optimizer).remove(), or drop this call or callback"
            raise ValueError(already_attached(self._kind, remedy))
        self._options = options
        self._targets = Targets(optimizer, model, options)
        self._targets.refuse_empty()
        self._handles = self._make_hooks().handles
        self._targets.were_bypassed()
        copy(self)._attach(optimizer)  # noqa: SLF001
        self._optimizer = optimizer  # but not in the copy, which the optimizer holds

    @property
    def plan(self) -> Plan:
        """The decision on each parameter of the optimizer, as a `gcx.plan.Plan`."""
        return self._targets.plan()

    @not_compiled
    @torch.no_grad()
    def centralize_grads_(self) -> None:
        """Centralize the gradients now, in place: `gcx.torch.centralize_grads_` by this plan."""
        weights = [*self._targets.weights()]
        centralize_gradients(weights, self._targets.parameters, self._options.strength)

    def remove(self) -> None:
        """Leave the optimizer as it was before; a second time does nothing."""
        if self._handles:
            self._warn_if_bypassed()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        vars(self._targets.get_optimizer()).pop("__reduce_ex__", None)

    def __repr__(self) -> str:
        where, strength = self._options.where, self._options.strength
        state = f"where={where!r}" + f", strength={strength}" * (strength != 1.0)
        state = state if self._handles else "removed"
        return f"<{type(self).__name__} of {self._kind}, {state}, {self.plan!r}>"

    def _make_hooks(self) -> GradientHooks | UpdateHooks:
        hooks = GradientHooks if self._options.where == "gradient" else UpdateHooks
        return hooks(self._targets, self._options)

    def _attach(self, optimizer: Optimizer) -> None:
        self._handles += [
            optimizer.register_load_state_dict_pre_hook(keep_switches),
            optimizer.register_load_state_dict_post_hook(self._warn_if_idle),
            optimizer.register_state_dict_pre_hook(self._warn_if_bypassed),
        ]
        remedy = "gcx.torch.centralize for the copy and its model"
        warn_of_copies(optimizer, "does not centralize", remedy)

    def _warn_if_idle(self, _: Optimizer) -> None:
        if not any(self._targets.weights()):
            warn(f"the checkpoint switches off all that there is to centralize in {self._kind}")
        self._targets.were_bypassed()

    def _warn_if_bypassed(self, *_: Any) -> None:
        if self._targets.were_bypassed():
            warn(
                f"this {self._kind} has made steps without a call of its step, so nothing was "
                "centralized: a hook makes them, say, or the step was replaced; "
                "gcx.torch.centralize_in_backward(model) needs no step"
            )


def _find_optimizer(optimizer: Optimizer) -> Optimizer:
    """Find the optimizer that runs hooks: Accelerate's wrapper runs none."""
    found: object = optimizer
    while isinstance(found, Optimizer):
        if "_optimizer_step_pre_hooks" in vars(found):
            return found
        found = getattr(found, "optimizer", None)
    msg = f"optimizer is a torch.optim.Optimizer, not {describe(optimizer, 'torch')}"
    if "deepspeed" in type(optimizer).__module__:
        msg += f". DeepSpeed flattens the weights: {IN_BACKWARD}"
    elif hasattr(optimizer, "step") and not isinstance(optimizer, type):
        msg += "; if that wraps one, give the one inside (often its attribute .optimizer)"
    raise TypeError(msg)


def _check_steps(optimizer: Optimizer) -> None:
    """Raise a TypeError unless this optimizer itself moves the weights, in its step."""
    kind = type(optimizer).__name__
    if step_of(type(optimizer)) is step_of(Optimizer):
        raise TypeError(
            f"{kind} has no step() in which to centralize (LOMO is like that): {IN_BACKWARD}"
        )
    for name, value in vars(optimizer).items():
        for one in tree_leaves(value):
            if isinstance(one, Optimizer) and one is not inner_optimizer(optimizer):
                raise TypeError(
                    f"{kind} moves the weights by another optimizer, whose steps may be called "
                    f"without its own: centralize that one, its attribute {name}"
                )


def centralized(optimizer: Optimizer) -> GradientCentralization | None:
    """Return the handle of an optimizer that `centralize` has changed; None for any other.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        As in `centralize`.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> gcx.torch.centralized(torch.optim.SGD(torch.nn.Linear(3, 2).parameters())) is None
    True
    """
    hooks = vars(_find_optimizer(optimizer))["_optimizer_load_state_dict_post_hooks"]
    found = copy(find_owner(hooks, GradientCentralization))
    if found is not None:
        vars(found).update(_optimizer=optimizer)
    return found
