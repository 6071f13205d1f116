"""Gradient Centralization for an optimizer from now on, or for the gradients there are now."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from inspect import unwrap
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from gcx.plan import Plan
from gcx.torch._calls import not_compiled, warn
from gcx.torch._optimizer import Decay, inner_optimizer
from gcx.torch._plan import (
    Layers,
    Overrides,
    check_choice,
    decide,
    nothing_to_centralize,
    weights_of,
)
from gcx.torch._step import GradientHooks, UpdateHooks
from gcx.torch._targets import IN_BACKWARD, Targets, keep_switches
from gcx.torch._weights import Together, Weight, with_gradient

Where = Literal["gradient", "update"]


def centralize(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    where: Where = "gradient",
    decay: Decay = None,
    layers: Layers = "all",
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> GradientCentralization:
    r"""Let an optimizer use Gradient Centralization from its next step on.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimizer; it goes on being used as before, by schedulers, gradient scalers and
        closures too. Parameters added to it later are covered. A parameter group with
        ``"centralize": False`` is left alone; the switch goes into ``state_dict()``, and loading a
        checkpoint without it, after this call, leaves it as it is.
    model : torch.nn.Module
        The model, all of whose layers say where the fan-in of their weights is. It must hold every
        parameter of the optimizer.
    where : {"gradient", "update"}, optional
        ``"gradient"`` centralizes what the optimizer uses as the gradient, in place in ``.grad``.
        ``"update"`` centralizes the displacement of the weights by the step, which the authors
        advise for adaptive optimizers; it keeps the mean of each weight over its fan-in constant
        with any optimizer.
    decay : {"inside", "outside"}, optional
        Whether weight decay is projected as well. With ``where="gradient"`` the default is inside
        if the optimizer adds it to the gradient (SGD, Adam), which is what the authors do, and
        outside if it applies it apart (AdamW, Muon); say it for an optimizer that is not one of
        torch's. With ``where="update"`` the default is inside; outside, decoupled decay goes on
        shrinking the mean by ``1 - lr * weight_decay`` a step.
    layers : {"all", "conv"}, optional
        ``"conv"`` is the variant of the paper for convolutions alone, of any rank.
    overrides : mapping, optional
        Answers that come before those of the layers, as in `plan`.
    reproducible : bool, optional
        Whether means are taken in the one order that gives equal bits on every device, whatever
        the strides: see :doc:`/reproducible`.

    Returns
    -------
    GradientCentralization
        A handle: ``.plan`` shows what is centralized and why, ``.remove()`` ends it.

    Raises
    ------
    TypeError
        If `optimizer` is not an optimizer of torch, holds another one that moves the weights, or
        has no step; if `model` is not a module; if a value of `overrides` is of none of its types;
        if a weight has a dtype, a device or shards for which `reproducible` cannot be promised.
        In a step: if the gradient of a weight to centralize is sparse.
    ValueError
        If the optimizer already has Gradient Centralization, if nothing would be centralized, if
        `decay` does not fit the optimizer or is needed and not given, or if `overrides` does not
        fit the model.
    RuntimeError
        If a parameter of the optimizer is not in the model, has no shape yet (lazy layers), or no
        longer that of its layer (FSDP1, DeepSpeed). In a step: if such a parameter was added, or
        one was replaced in the model, as `load_state_dict(assign=True)`, `to_empty` and
        `fully_shard` do, and not in the optimizer.

    Warns
    -----
    UserWarning
        If weights narrower than 32 bits are to be centralized in the update; if momentum from
        before carries a mean; if the optimizer is copied or pickled, since its copy does not
        centralize; if a checkpoint switches everything off.

    See Also
    --------
    plan : what would be centralized.
    centralize_grads_ : centralize gradients now, such as before clipping.
    gcx.centralize : the operator, for one gradient.

    Notes
    -----
    With P the projection of `gcx.centralize`, w the weights and L the loss, an optimizer that adds
    weight decay to the gradient is given a gradient such that it uses

    .. math:: P(\nabla L + \lambda w) = \nabla L - \overline{\nabla L}
              + \lambda w - \lambda \overline{w}

    with bars for means over the fan-in. Hence SGD, with or without momentum, keeps the mean of
    each weight at its initial value (corollary 4.1). Optimizers that divide the gradient element
    by element, such as Adam, do so only with ``where="update"``.

    Momentum from steps before this call would go on moving that mean, so with
    ``where="gradient"`` the buffers ``momentum_buffer`` and ``exp_avg`` and the memory of LBFGS
    are centralized, with a warning, now, when a group is switched on, and after each
    ``load_state_dict`` (not the momentum of RMSprop, which holds gradients already divided).
    Momentum of centralized gradients has no mean and is left as it is.

    Gradients are centralized when the step begins, so after clipping and averaging over workers,
    and again whenever a closure has computed new ones. Where an optimizer is built around another
    (SAM, Lookahead), give the one inside. Optimizers that step during backward hold a parameter
    each: give those whose parameter has a fan-in. `torch.compile` calls the hooks as they are, at
    one break of the graph.

    With ``where="gradient"`` and ``decay="outside"``, an optimizer that adds decay to the gradient
    keeps the mean of that in its momentum, which is left alone, also that from before.

    Copies of an optimizer by `copy.deepcopy` or pickle carry no hooks, and warn of it: call this
    again for them.

    References
    ----------
    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, algorithms 1 and 2. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> gcx.torch.centralize(optimizer, model)
    <GradientCentralization of SGD, where='gradient', <gcx plan: 1 of 2 parameters centralized>>
    >>> start = model.weight.mean().item()
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.rand(8, 3)).square().mean().backward()
    ...     optimizer.step()
    >>> abs(model.weight.mean().item() - start) < 1e-6
    True
    """
    return GradientCentralization(
        optimizer,
        model,
        where=where,
        decay=decay,
        layers=layers,
        overrides=overrides,
        reproducible=reproducible,
    )


class GradientCentralization:
    """Gradient Centralization at work in an optimizer, as `gcx.torch.centralize` returns it.

    Parameters
    ----------
    optimizer, model, where, decay, layers, overrides, reproducible
        As in `gcx.torch.centralize`.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> handle = gcx.torch.centralize(optimizer, model, where="update")
    >>> print(handle.plan)
    parameter  shape  layout  reason
    weight     2x3    o...    Linear
    bias       2      -       bias
    1 of 2 parameters centralized
    >>> handle.remove()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        where: Where,
        decay: Decay,
        layers: Layers,
        overrides: Overrides | None,
        reproducible: bool,
    ) -> None:
        check_options(where, decay)
        optimizer = _unwrapped(optimizer)
        _check_steps(optimizer)
        _check_has_no_other(optimizer)
        self._optimizer = optimizer
        self._where = where
        self._targets = Targets(
            optimizer, partial(decide, model, layers, overrides), reproducible=reproducible
        )
        self._together = Together()
        if not any(self._targets.weights()):
            raise ValueError(nothing_to_centralize(type(optimizer).__name__, self.plan))
        self._hooks = self._place(decay).hooks
        self._hooks += [
            optimizer.register_load_state_dict_pre_hook(keep_switches),
            optimizer.register_load_state_dict_post_hook(self._warn_if_idle),
        ]
        # Asked of the instance first, by pickle and by copy.deepcopy.
        vars(optimizer)["__reduce_ex__"] = partial(_reduce_with_warning, optimizer)

    @property
    def plan(self) -> Plan:
        """What happens to each parameter of the optimizer, and why, as a `gcx.plan.Plan`."""
        return self._targets.plan()

    @not_compiled
    @torch.no_grad()
    def centralize_grads_(self) -> None:
        """Centralize the gradients now, in place: `gcx.torch.centralize_grads_` by this plan.

        Raises
        ------
        TypeError, RuntimeError
            As a step would.
        ValueError
            If there is no gradient to centralize.
        """
        centralize_gradients(self._targets.weights(), self._together)

    def remove(self) -> None:
        """Leave the optimizer as it was before; a second time does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        vars(self._optimizer).pop("__reduce_ex__", None)

    def __repr__(self) -> str:
        name, kind = type(self).__name__, type(self._optimizer).__name__
        state = f"where={self._where!r}" if self._hooks else "removed"
        return f"<{name} of {kind}, {state}, {self.plan!r}>"

    def _place(self, decay: Decay) -> GradientHooks | UpdateHooks:
        """Make what centralizes in each step."""
        place = GradientHooks if self._where == "gradient" else UpdateHooks
        return place(self._targets, decay)

    def _warn_if_idle(self, optimizer: Optimizer) -> None:
        if not any(self._targets.weights()):
            kind = type(optimizer).__name__
            warn(f"the checkpoint switches off all that there is to centralize in this {kind}")


def check_options(where: object, decay: object) -> None:
    """Raise a ValueError unless these are among the choices."""
    check_choice("where", where, ("gradient", "update"))
    check_choice("decay", decay, (None, "inside", "outside"))


def _reduce_with_warning(optimizer: Optimizer, protocol: int) -> Any:
    kind = type(optimizer).__name__
    warn(
        f"the copy of this {kind} does not centralize: hooks are not copied. Call "
        "gcx.torch.centralize for the copy and its model; or copy state_dict() instead"
    )
    return type(optimizer).__reduce_ex__(optimizer, protocol)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """Find the optimizer that has the hooks: Accelerate's is a wrapper that has none."""
    found: object = optimizer
    while isinstance(found, Optimizer):
        if "_optimizer_step_pre_hooks" in vars(found):
            return found
        found = getattr(found, "optimizer", None)
    msg = (
        f"optimizer is a torch.optim.Optimizer, not a {type(optimizer).__name__}; if that wraps "
        "one, give the one inside (often its attribute .optimizer). For DeepSpeed, which flattens "
        f"the weights: {IN_BACKWARD}"
    )
    raise TypeError(msg)


def _check_steps(optimizer: Optimizer) -> None:
    """Raise a TypeError unless it is this optimizer that moves the weights, in its step."""
    kind = type(optimizer).__name__
    if unwrap(type(optimizer).step) is unwrap(Optimizer.step):
        msg = f"{kind} has no step() in which to centralize (LOMO is like that): {IN_BACKWARD}"
        raise TypeError(msg)
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer) and value is not inner_optimizer(optimizer):
            msg = (
                f"{kind} moves the weights by another optimizer, whose steps may be called without "
                f"its own: centralize that one, its attribute {name}"
            )
            raise TypeError(msg)


def _check_has_no_other(optimizer: Optimizer) -> None:
    hooks = vars(optimizer)["_optimizer_load_state_dict_post_hooks"].values()
    if any(isinstance(getattr(h, "__self__", None), GradientCentralization) for h in hooks):
        kind = type(optimizer).__name__
        msg = f"this {kind} has Gradient Centralization already; .remove() that handle first"
        raise ValueError(msg)


@not_compiled
@torch.no_grad()
def centralize_grads_(
    model: nn.Module,
    *,
    layers: Layers = "all",
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> None:
    """Centralize the gradients of a model now, in place in ``.grad``.

    For loops that need centralized gradients before the step, such as to clip their norm; where
    nothing comes between, `centralize` does it for an optimizer once and for all. Both together are
    right too: the step centralizes again, which changes nothing, and includes weight decay. Where
    that has overrides or switches, call ``centralize_grads_()`` of its handle, which has the same.

    Parameters
    ----------
    model : torch.nn.Module
        The model, after ``backward()``. Parameters without gradient are passed over.
    layers, overrides
        As in `plan`, which shows what is centralized.
    reproducible : bool, optional
        Whether means are taken in the one order that gives equal bits on every device, whatever
        the strides: see :doc:`/reproducible`.

    Raises
    ------
    TypeError
        If `model` is not a module, or the gradient of a weight to centralize is sparse; if a
        weight has a dtype, a device or shards for which `reproducible` cannot be promised.
    ValueError
        As `plan`; or if there is no gradient to centralize.
    RuntimeError
        As `plan`.

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
    decisions = decide(model, layers, overrides).items()
    centralize_gradients(weights_of(decisions, reproducible=reproducible), Together())


def centralize_gradients(weights: Iterable[Weight], together: Together) -> None:
    """Centralize what gradients there are; a ValueError if there are none."""
    found = with_gradient(weights)
    if not found:
        msg = "there is no gradient to centralize; call backward() first, and see gcx.torch.plan"
        raise ValueError(msg)
    together.centralize_({None: found})
