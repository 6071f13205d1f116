"""Gradient Centralization as hooks around the step of an optimizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from inspect import unwrap
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcx.plan import Plan
from gcx.torch._decay import Decay, Group, coupled_rate, shrinkage
from gcx.torch._gradients import centralize_gradient, has_gradient
from gcx.torch._momentum import centralize_momentum
from gcx.torch._overrides import Overrides
from gcx.torch._plan import Decision, Layers, Weight, check_choice, decide, plan_of
from gcx.torch._untraced import untraced
from gcx.torch._warn import warn

Where = Literal["gradient", "update"]

# The key by which a parameter group switches Gradient Centralization off; it is on by default.
_SWITCH = "centralize"
_SWITCHED_OFF = f"switched off: {_SWITCH!r} is False in its parameter group"

# The way out for what flattens weights, or updates them outside of a step.
_IN_BACKWARD = "call gcx.torch.centralize_in_backward(model) before the model is wrapped"


def centralize(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    where: Where = "gradient",
    decay: Decay = None,
    layers: Layers = "all",
    overrides: Overrides | None = None,
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

    Returns
    -------
    GradientCentralization
        A handle: ``.plan`` shows what is centralized and why, ``.remove()`` ends it.

    Raises
    ------
    TypeError
        If `optimizer` is not an optimizer of torch, or wraps one; if `model` is not a module. In
        a step: if the gradient of a weight to centralize is sparse. If a value of `overrides` is
        of none of its types.
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
        centralize.

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
    (SAM), only the one whose ``step`` is called can be given; weight decay is that of the inner
    one. Optimizers that step during backward hold a parameter each: give those whose parameter has
    a fan-in. `torch.compile` calls the hooks as they are, at one break of the graph.

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
        optimizer, model, where=where, decay=decay, layers=layers, overrides=overrides
    )


class GradientCentralization:
    """Gradient Centralization at work in an optimizer, as `gcx.torch.centralize` returns it.

    Parameters
    ----------
    optimizer, model, where, decay, layers, overrides
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
    ) -> None:
        check_choice("where", where, ("gradient", "update"))
        check_choice("decay", decay, (None, "inside", "outside"))
        optimizer = _unwrapped(optimizer)
        _check_steps(optimizer)
        _check_has_no_other(optimizer)
        self._optimizer = optimizer
        self._decide = partial(decide, model, layers, overrides)
        self._where = where
        self._decay: Decay = decay
        self._decisions: dict[Tensor, Decision] = self._decide()
        self._switches = self._read_switches()
        weights = list(self._weights())
        if not weights:
            msg = f"there is nothing to centralize in this {type(optimizer).__name__}:\n{self.plan}"
            raise ValueError(msg)
        find_decay = coupled_rate if where == "gradient" else shrinkage
        for group in optimizer.param_groups:
            if any(self._weights_of(group)):
                find_decay(optimizer, group, decay)  # raises here what a step would raise
        if where == "gradient":
            centralize_momentum(optimizer, weights)
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_load_state_dict_post_hook(self._centralize_momentum),
            ]
        else:
            _warn_of_low_precision(weights)
            # A stack, since a step that calls the step of its base class runs the hooks of both.
            # What a step that raised has left behind falls off the far end.
            self._baselines: deque[list[_Baseline]] = deque(maxlen=_count_steps(type(optimizer)))
            self._hooks = [
                optimizer.register_step_pre_hook(self._remember_means),
                optimizer.register_step_post_hook(self._restore_means),
            ]
        self._hooks.append(optimizer.register_load_state_dict_pre_hook(_keep_switches))
        # Asked of the instance first, by pickle and by copy.deepcopy.
        vars(optimizer)["__reduce_ex__"] = partial(_reduce_with_warning, optimizer)

    @property
    def plan(self) -> Plan:
        """What happens to each parameter of the optimizer, and why, as a `gcx.plan.Plan`."""
        groups = self._optimizer.param_groups
        is_on = {parameter: _is_on(group) for group in groups for parameter in group["params"]}
        found = {p: decision for p, decision in self._decide().items() if p in is_on}
        return plan_of({p: d if is_on[p] else _switched_off(d) for p, d in found.items()})

    def remove(self) -> None:
        """Leave the optimizer as it was before; a second time does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        vars(self._optimizer).pop("__reduce_ex__", None)

    def __repr__(self) -> str:
        name, kind = type(self).__name__, type(self._optimizer).__name__
        return f"<{name} of {kind}, where={self._where!r}, {self.plan!r}>"

    @untraced
    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._switches != self._read_switches():
            self._switches = self._read_switches()
            self._centralize_momentum()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._centralize_gradients()
            return None
        # An optimizer may use gradients from before its closure, or ignore the closure. A closure
        # that adds to these gradients, and clips the sum, finds them as they were.
        means = self._means_of_gradients()
        self._centralize_gradients()

        def centralizing() -> Any:
            while means:
                _restore_mean_of_gradient(*means.pop())
            loss = closure()
            if self._hooks:  # none if the closure has removed this
                self._centralize_gradients()
            return loss

        new_args = tuple(centralizing if value is closure else value for value in args)
        return new_args, {k: centralizing if v is closure else v for k, v in kwargs.items()}

    def _centralize_momentum(self, *_: Any) -> None:
        # After loading too: the checkpoint may be of a run without centralization.
        centralize_momentum(self._optimizer, self._weights())

    @untraced
    @torch.no_grad()
    def _centralize_gradients(self) -> None:
        jobs: list[tuple[Weight, float | Tensor | None]] = []
        for group in self._optimizer.param_groups:
            weights = [weight for weight in self._weights_of(group) if has_gradient(weight)]
            if weights:
                rate = coupled_rate(self._optimizer, group, self._decay)
                jobs += [(weight, rate) for weight in weights]
        for weight, rate in jobs:
            centralize_gradient(weight, rate)

    @untraced
    @torch.no_grad()
    def _means_of_gradients(self) -> list[tuple[Weight, Tensor]]:
        return [
            (weight, weight.fan_in.mean(grad))
            for weight in self._weights()
            if has_gradient(weight) and (grad := weight.parameter.grad) is not None
        ]

    @untraced
    @torch.no_grad()
    def _remember_means(self, optimizer: Optimizer, *_: Any) -> None:
        baselines: list[_Baseline] = []
        for group in optimizer.param_groups:
            weights = list(self._weights_of(group))
            if weights:
                factor = shrinkage(optimizer, group, self._decay)
                baselines += [_Baseline(w, w.fan_in.mean(w.parameter), factor) for w in weights]
        self._baselines.append(baselines)

    @untraced
    @torch.no_grad()
    def _restore_means(self, *_: Any) -> None:
        for baseline in self._baselines.pop():
            _restore_mean(*baseline)

    def _read_switches(self) -> list[bool]:
        return [_is_on(group) for group in self._optimizer.param_groups]

    def _weights(self) -> Iterator[Weight]:
        for group in self._optimizer.param_groups:
            yield from self._weights_of(group)

    def _weights_of(self, group: Group) -> Iterator[Weight]:
        """List what there is to centralize in a group."""
        if _is_on(group):
            for parameter in group["params"]:
                decision = self._decision(parameter)
                if decision.fan_in is not None:
                    yield Weight(decision.name, parameter, decision.fan_in)

    def _decision(self, parameter: Tensor) -> Decision:
        known = self._decisions.get(parameter)
        if known is not None and known.is_about(parameter):
            return known
        found = self._decide()  # it may have been added, or moved
        if parameter not in found:
            raise RuntimeError(_replaced(known.name) if known else _foreign(parameter))
        self._decisions = found
        return found[parameter]


class _Baseline(NamedTuple):
    """What to hold on to in the update of a weight: its mean, but for the decay of that."""

    weight: Weight
    mean: Tensor
    shrinkage: float | Tensor | None


def _restore_mean(weight: Weight, mean: Tensor, shrinkage: float | Tensor | None) -> None:
    _, parameter, fan_in = weight
    if shrinkage is not None and parameter.grad is not None:  # else the optimizer passes it over
        mean = mean * shrinkage
    fan_in.subtract_(parameter, fan_in.mean(parameter) - mean)


@torch.no_grad()
def _restore_mean_of_gradient(weight: Weight, mean: Tensor) -> None:
    _, parameter, fan_in = weight
    if parameter.grad is not None:
        fan_in.subtract_(parameter.grad, fan_in.mean(parameter.grad) - mean)


def _replaced(name: str) -> str:
    return (
        f"{name} was replaced in the model, and the optimizer goes on updating the old one "
        "(load_state_dict(assign=True), to_empty, fully_shard and weight_norm replace "
        "parameters); make the optimizer after that, and centralize the new one"
    )


def _foreign(parameter: Tensor) -> str:
    return (
        f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the "
        f"model. Give the model that holds them all (torch.nn.ModuleList makes one of several), or "
        f"put it into a parameter group with {_SWITCH!r}: False; if parameters were flattened "
        f"(DeepSpeed), {_IN_BACKWARD}"
    )


def _warn_of_low_precision(weights: list[Weight]) -> None:
    narrow = [w for w in weights if torch.finfo(w.parameter.dtype).bits < 32]
    if narrow:
        name, parameter, _ = narrow[0]
        warn(
            f"{name} is {parameter.dtype}: rounding the weights loses most of what where='update' "
            "does; keep float32 weights, or use where='gradient'"
        )


def _reduce_with_warning(optimizer: Optimizer, protocol: int) -> Any:
    kind = type(optimizer).__name__
    warn(
        f"the copy of this {kind} does not centralize: hooks are not copied. Call "
        "gcx.torch.centralize for the copy and its model; or copy state_dict() instead"
    )
    return type(optimizer).__reduce_ex__(optimizer, protocol)


def _is_on(group: Group) -> bool:
    switch = group.get(_SWITCH, True)
    if not isinstance(switch, bool):
        msg = f"{_SWITCH!r} in a parameter group is True or False, not {switch!r}"
        raise TypeError(msg)
    return switch


def _switched_off(decision: Decision) -> Decision:
    if decision.fan_in is None:
        return decision
    return decision._replace(fan_in=None, reason=_SWITCHED_OFF)


def _keep_switches(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Keep the switches of parameter groups that a checkpoint knows nothing of."""
    here = [{k: v for k, v in g.items() if k == _SWITCH} for g in optimizer.param_groups]
    saved = state_dict["param_groups"]
    if len(here) != len(saved):
        return state_dict  # torch has an error for that
    groups = [{**switch, **group} for switch, group in zip(here, saved, strict=True)]
    return {**state_dict, "param_groups": groups}


def _count_steps(kind: type[Optimizer]) -> int:
    """Count the steps that can run within one another: those of a class and its bases."""
    return sum("step" in vars(base) for base in kind.__mro__)


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
        f"the weights: {_IN_BACKWARD}"
    )
    raise TypeError(msg)


def _check_steps(optimizer: Optimizer) -> None:
    if unwrap(type(optimizer).step) is unwrap(Optimizer.step):
        kind = type(optimizer).__name__
        msg = f"{kind} has no step() in which to centralize (LOMO is like that): {_IN_BACKWARD}"
        raise TypeError(msg)


def _check_has_no_other(optimizer: Optimizer) -> None:
    hooks = vars(optimizer)["_optimizer_step_pre_hooks"].values()
    if any(isinstance(getattr(h, "__self__", None), GradientCentralization) for h in hooks):
        kind = type(optimizer).__name__
        msg = f"this {kind} has Gradient Centralization already; .remove() that handle first"
        raise ValueError(msg)
