"""The step of AdamW or SGD by the kernels, which centralize the gradient too."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from inspect import unwrap
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, zeros_like
from torch.autograd.graph import increment_version

from gcx._options import Options
from gcx.backends import _torch_cuda as kernels
from gcx.backends._torch import is_for_kernels
from gcx.backends._torch_dtensor import FanIn, see_all, see_here
from gcx.torch._centralize import GradientCentralization
from gcx.torch._optimizer import RULES, Group, State, coupled_rate
from gcx.torch._step import GradientHooks
from gcx.torch._targets import Targets
from gcx.torch._weights import Weight, centralize_, with_gradient


class CentralizationInStep(GradientCentralization):
    """As `GradientCentralization` with ``where="gradient"``, for an optimizer with a rule."""

    def _make_hooks(self) -> StepHooks:
        self.hooks = StepHooks(self._targets, self._options)
        return self.hooks


class StepHooks(GradientHooks):
    """Hooks that skip the parameter groups that the kernels centralize in `step`."""

    def __init__(self, targets: Targets, options: Options) -> None:
        self._rule = next(rule for rule in RULES if isinstance(targets.optimizer, rule.kind))
        self._marked: dict[int, dict[Tensor, Weight]] = {}  # by the id of the group
        super().__init__(targets, options)

    def step(self, group: Group, remember: Callable[[list[Tensor]], object]) -> list[Tensor]:
        """Centralize and update what the kernels take; `remember` makes missing states.

        Returns the other parameters, for torch to update; their gradients are centralized.
        """
        marked = self._marked.pop(id(group), None)
        if marked is None:  # the hooks have centralized it, or there are none in this step
            return cast("list[Tensor]", group["params"])
        optimizer = self._targets.optimizer
        parameters = [p for p in group["params"] if p.grad is not None]
        if new := [p for p in parameters if not optimizer.state.get(p)]:
            remember(new)
        by_stage: dict[Hashable, list[Tensor]] = {}
        for p in parameters:
            stage = self._rule.find_stage(group, optimizer.state.get(p, {}))
            by_stage.setdefault(stage, []).append(p)
        left = by_stage.pop(None, [])
        for stage, members in by_stage.items():
            left += self._step_of_stage(group, stage, members, marked)
        if left:
            gradients = with_gradient([marked[p] for p in left if p in marked])
            centralize_(gradients, coupled_rate(optimizer, group, None))
        return left

    @torch.no_grad()
    def fallback(self, group: Group) -> str:
        """Say why torch will step some parameters of a group; empty if the kernels step all."""
        if reason := self._why_not() or self._why_not_group(group):
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
        for option in self._rule.scalars:
            values = group[option] if isinstance(group[option], tuple) else (group[option],)
            if any(isinstance(value, Tensor) for value in values):
                return f"{option} is a tensor"
        # Asked only if there is a parameter on CUDA: the answer makes a CUDA context.
        device = next((p.device for p in group["params"] if is_for_kernels(p)), None)
        return "no parameter on a CUDA device" if device is None else kernels.why_not(device)

    def _why_not_parameter(
        self, group: Group, parameter: Tensor, state: State, weight: Weight | None
    ) -> str:
        """See `fallback`; a gradient or state that is missing is taken to be like the parameter."""
        grad = parameter if parameter.grad is None else parameter.grad
        tensors = [grad, parameter]
        if state:
            if self._rule.find_stage(group, state) is None:
                return "the state is from another optimizer, or the steps are counted on the GPU"
            tensors += chain(*self._memory(group, [state], [grad]).values())
        if any(kernels.form(tensor) != kernels.form(parameter) for tensor in tensors):
            return "a gradient or state differs from its parameter in dtype, shape or strides"
        fan_in = _find_fan_in(parameter, weight)
        if kernels.see(see_here(grad, fan_in, grad), fan_in[1]):
            return ""
        kind = f"{type(grad).__name__} of {grad.dtype} and shape {tuple(grad.shape)}"
        return f"the kernels do not take a {kind} with strides {grad.stride()} on {grad.device}"

    def _step_of_stage(
        self, group: Group, stage: Hashable, parameters: list[Tensor], marked: dict[Tensor, Weight]
    ) -> list[Tensor]:
        """Make the step of parameters that are equally far; return those that are left."""
        if kernels.is_traced():
            return parameters
        states = [self._targets.optimizer.state.get(p, {}) for p in parameters]
        grads = [cast("Tensor", parameter.grad) for parameter in parameters]
        memory = self._memory(group, states, grads)
        fan_ins = [_find_fan_in(p, marked.get(p)) for p in parameters]
        rule, numbers = self._rule.find_numbers(group, stage)
        lists = grads, parameters, *memory.values()
        roles = [see_all(tensors, fan_ins, grads) for tensors in lists]
        axes = [axes for _, axes in fan_ins]
        launches = kernels.find_launches(rule, roles, axes, self._options.reproducible)
        results = launches.run(roles, numbers)
        done = [k for k, result in enumerate(results) if result is not None]
        increment_version([tensors[k] for tensors in lists[1:] for k in done])
        for key, tensors in memory.items():
            for k in done:
                states[k][key] = tensors[k]
        if done and "exp_avg" in memory:
            one = torch.tensor(1.0, device="cpu")  # torch would make a tensor of a number for each
            torch._foreach_add_([states[k]["step"] for k in done], one, alpha=1.0)
        return [parameters[k] for k in sorted({*range(len(parameters))}.difference(done))]

    def _memory(self, group: Group, states: list[State], grads: list[Tensor]) -> dict[str, Any]:
        """List the state tensors under each key; missing ones are made."""
        pairs = [*zip(states, grads, strict=True)]
        return {
            key: [zeros_like(g) if s.get(key) is None else s[key] for s, g in pairs]
            for key in (() if group.get("momentum") == 0 else self._rule.memory)
        }


def _find_fan_in(parameter: Tensor, weight: Weight | None) -> FanIn:
    return (parameter.shape, ()) if weight is None else weight.fan_in
