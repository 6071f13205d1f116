"""The step of AdamW or SGD by the kernels, which centralize the gradient too."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from inspect import unwrap
from operator import is_
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from gcx._options import Options
from gcx.backends import _torch_cuda
from gcx.backends._torch import is_for_kernels
from gcx.backends._torch_triton import forms
from gcx.torch._centralize import GradientCentralization
from gcx.torch._optimizer import Group, Rule, Scalars, State, coupled_rate
from gcx.torch._step import GradientHooks
from gcx.torch._targets import Targets
from gcx.torch._weights import Weight, centralize_, with_gradient

T = TypeVar("T")
# One list for each role in a step: gradients, parameters, and each kind of state.
Roles = Sequence[Sequence[Tensor]]
Weights = Sequence[Weight | None]  # of all parameters; None for those not to centralize

_PLAIN = (Tensor, Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lists of parameters whose tables are kept, for steps in which not all have a gradient.
_KEPT = 8


class CentralizationInStep(GradientCentralization):
    """As `GradientCentralization` with ``where="gradient"``, for an optimizer with a `Rule`."""

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, options: Options, rule: Rule
    ) -> None:
        self._rule = rule
        super().__init__(optimizer, model, options)
        del vars(optimizer)["__reduce_ex__"]  # its copies need no warning

    def _make_hooks(self) -> StepHooks:
        self.hooks = StepHooks(self._targets, self._options, self._rule)
        return self.hooks


class StepHooks(GradientHooks):
    """Hooks that skip the parameter groups that the kernels centralize in `step`.

    The optimizer calls `step` when torch comes to a group.
    """

    def __init__(self, targets: Targets, options: Options, rule: Rule) -> None:
        self._rule = rule
        self._kept: dict[Hashable, _Tables] = {}
        self._marked: dict[int, dict[Tensor, Weight]] = {}  # by the id of the group
        super().__init__(targets, options)

    def step(self, group: Group, remember: Callable[[list[Tensor]], object]) -> list[Tensor]:
        """Centralize and update the parameters of a group that the kernels take.

        `remember` makes the state of parameters that have none yet. Returns the other parameters,
        their gradients centralized, for torch to update.
        """
        marked = self._marked.pop(id(group), None)
        if marked is None:  # the hooks have centralized it, or there are none in this step
            return cast("list[Tensor]", group["params"])
        optimizer = self._targets.optimizer
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [optimizer.state.get(p, {}) for p in parameters]
        if not all(states):
            remember([p for p, state in zip(parameters, states, strict=True) if not state])
            states = [optimizer.state.get(p, {}) for p in parameters]
        weights = [*map(marked.get, parameters)]
        left: list[Tensor] = []
        for stage, members in _positions(self._rule.stages(group, states)).items():
            here, their_weights = _at(members, parameters), _at(members, weights)
            places: Sequence[int] = range(len(here))
            if stage is not None:
                places = self._step_of_stage(group, stage, here, their_weights)
            left += [here[k] for k in places]
        if not left:
            return []
        gradients = with_gradient([marked[p] for p in left if p in marked])
        centralize_(gradients, coupled_rate(optimizer, group, None))
        return left

    @torch.no_grad()
    def fallback(self, group: Group) -> str:
        """Say why torch will make the next step of a group, or of some of its parameters.

        Empty if the kernels will make all of it.
        """
        reason = self._why_not() or self._why_not_group(group)
        if reason:
            return reason
        state = self._targets.optimizer.state
        try:
            weights = {weight.parameter: weight for weight in self._targets.weights()}
        except RuntimeError as error:  # a step would raise it
            return str(error)
        reasons = (
            self._why_not_parameter(group, p, state.get(p, {}), weights.get(p))
            for p in group["params"]
            if p.requires_grad
        )
        return next(filter(None, reasons), "")

    def __getstate__(self) -> dict[str, Any]:
        # Tables are on a device and hold addresses, so a copy of an optimizer makes its own.
        return {**vars(self), "_kept": {}}

    def _by_group(self) -> list[tuple[Group, list[Weight]]]:
        weights = {id(group): found for group, found in super()._by_group()}
        is_for_torch = bool(self._why_not())
        self._marked.clear()
        left = []
        for group in self._targets.optimizer.param_groups:
            found = weights.get(id(group), [])
            if not (is_for_torch or self._why_not_group(group)):
                self._marked[id(group)] = {w.parameter: w for w, _ in with_gradient(found)}
            elif found:
                left.append((group, found))
        return left

    def _why_not(self) -> str:
        optimizer = self._targets.optimizer
        if unwrap(type(optimizer).step) is not unwrap(self._rule.kind.step):
            return f"{type(optimizer).__name__} has a step of its own"
        if len(vars(optimizer)["_optimizer_step_pre_hooks"]) > 1:
            return "other hooks before the step may use the gradients"
        if self._options.strength != 1.0:
            return f"strength is {self._options.strength}"
        for attribute in ("grad_scale", "found_inf"):  # set by a GradScaler
            if getattr(optimizer, attribute, None) is not None:
                return f"{attribute} is set"
        return ""

    def _why_not_group(self, group: Group) -> str:
        for option, value in self._rule.fixed.items():
            if group[option] != value:
                return f"{option}={group[option]!r}"
        for option in self._rule.numbers:
            values = group[option] if isinstance(group[option], tuple) else (group[option],)
            if any(isinstance(value, Tensor) for value in values):
                return f"{option} is a tensor"
        # Asked only if there is a parameter on CUDA: the answer makes a CUDA context.
        device = next((p.device for p in group["params"] if is_for_kernels(p)), None)
        return "no parameter on a CUDA device" if device is None else _torch_cuda.why_not(device)

    def _why_not_parameter(
        self, group: Group, parameter: Tensor, state: State, weight: Weight | None
    ) -> str:
        """Say why a parameter would be left to torch; empty if the kernels would take it.

        A gradient or state that is still missing is assumed to be like the parameter.
        """
        grad = parameter if parameter.grad is None else parameter.grad
        if not state:
            return _why_not([grad, parameter], weight)
        if None in self._rule.stages(group, [state]):
            return "the state is from another optimizer, or the steps are counted on the GPU"
        memory = self._rule.memory(group, [state], [grad])
        return _why_not([grad, parameter, *(tensor for (tensor,) in memory)], weight)

    def _step_of_stage(
        self, group: Group, stage: Hashable, parameters: Sequence[Any], weights: Weights
    ) -> list[int]:
        """Make the step of parameters that are equally far; return the positions that are left."""
        states = [self._targets.optimizer.state.get(p, {}) for p in parameters]
        grads = [parameter.grad for parameter in parameters]
        memory = self._rule.memory(group, states, grads)
        roles = [grads, parameters, *memory]
        left = self._tables(roles, weights).run(roles, self._rule.scalars(group, stage))
        done = sorted({*range(len(parameters))}.difference(left))
        if done:
            self._rule.remember(_at(done, states), [_at(done, kept) for kept in memory])
        return left

    def _tables(self, roles: Roles, weights: Weights) -> _Tables:
        key = (len(roles), *map(id, roles[1]))
        tables = self._kept.pop(key, None)  # the last one used moves to the end
        if tables is None or not tables.are_for(roles, weights):
            tables = _Tables(self._rule.name, roles, weights)
        self._kept[key] = tables
        if len(self._kept) > _KEPT:
            self._kept.pop(next(iter(self._kept)), None)  # unless another thread has done so
        return tables


class _Tables:
    """The launches for a list of parameters."""

    def __init__(self, rule: str, roles: Roles, weights: Weights) -> None:
        # Holding the parameters keeps their ids from being used again.
        self._parameters, self._memory, self._weights = roles[1], roles[2:], weights
        self._forms = [forms(tensors) for tensors in roles[:2]]
        reasons = enumerate(map(_why_not, zip(*roles, strict=True), weights))
        self._left = {k for k, reason in reasons if reason}
        centralized = [(k, weight) for k, weight in enumerate(weights) if weight is not None]
        self._split = [
            (k, weight.fan_in[0])
            for k, weight in centralized
            if k not in self._left and len(weight.fan_in[0]) != weight.parameter.ndim
        ]
        self._schedule = _torch_cuda.Schedule(
            rule,
            self._view(roles),
            [() if weight is None else weight.fan_in[1] for weight in weights],
            any_order=not any(weight.reproducible for _, weight in centralized),
            left=self._left,
        )

    def are_for(self, roles: Roles, weights: Weights) -> bool:
        """Return True for the same parameters, with gradients in the same form.

        Gradients may change form between steps; state tensors do not, so identity is enough.
        """
        return (
            all(map(is_, weights, self._weights))
            and all(all(map(is_, *pair)) for pair in zip(roles[2:], self._memory, strict=True))
            and [forms(tensors) for tensors in roles[:2]] == self._forms
            and all(_why_not([each[k] for each in roles], weights[k]) for k in self._left)
        )

    def run(self, roles: Roles, scalars: Scalars) -> list[int]:
        """Centralize and update; return the positions of the parameters that are left."""
        return self._schedule.run(self._view(roles), **scalars)

    def _view(self, roles: Roles) -> Roles:
        """Give each tensor the shape that its layout splits."""
        if not self._split:
            return roles
        seen = [[*tensors] for tensors in roles]
        for tensors in seen:
            for k, shape in self._split:
                tensors[k] = tensors[k].view(shape)
        return seen


def _why_not(tensors: Sequence[Tensor], weight: Weight | None) -> str:
    """Say why the kernels do not take a parameter; empty if they do.

    `tensors` are the gradient, the parameter and its state.
    """
    grad, parameter, *_ = tensors
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        return f"a parameter is a {type(parameter).__name__}, its gradient a {type(grad).__name__}"
    if grad.layout is not torch.strided:
        return f"a gradient is {grad.layout}"
    if parameter.dtype not in _DTYPES:
        return f"a parameter is {parameter.dtype}"
    if any(_form(tensor) != _form(parameter) for tensor in tensors):
        return "a gradient or state differs from its parameter in dtype, device, shape or strides"
    shape, axes = (parameter.shape, ()) if weight is None else weight.fan_in
    seen = [tensor.view(shape) if len(shape) != tensor.ndim else tensor for tensor in tensors]
    if not all(_torch_cuda.takes(tensor, axes, tensor) for tensor in seen):
        kind = f"{type(grad).__name__} of shape {tuple(grad.shape)}"
        return f"the kernels do not take a {kind} with strides {grad.stride()} on {grad.device}"
    return ""


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _positions(values: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """List the positions of each value."""
    everywhere = list(range(len(values)))
    if values and values.count(values[0]) == len(values):  # as a rule
        return {values[0]: everywhere}
    found: dict[Hashable, list[int]] = {}
    for k in everywhere:
        found.setdefault(values[k], []).append(k)
    return found


def _at(places: list[int], values: Sequence[T]) -> Sequence[T]:
    """Pick the values at some positions, which are in order."""
    return values if len(places) == len(values) else [values[k] for k in places]
