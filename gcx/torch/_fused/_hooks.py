"""Gradient Centralization of an optimizer that leaves it to the kernels where these can step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import unwrap
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcx.backends import _torch_cuda
from gcx.torch._centralize import GradientCentralization
from gcx.torch._fused._launches import Launches
from gcx.torch._fused._rules import Rule
from gcx.torch._optimizer import Decay, Group, coupled_rate
from gcx.torch._plan import Layers, Overrides
from gcx.torch._step import GradientHooks
from gcx.torch._targets import Targets
from gcx.torch._weights import Weight, is_for_kernels, with_gradient


class CentralizationInStep(GradientCentralization):
    """As `GradientCentralization` with ``where="gradient"``, of an optimizer with a `Rule`."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        rule: Rule,
        *,
        layers: Layers,
        overrides: Overrides | None,
        reproducible: bool,
    ) -> None:
        self._rule = rule
        super().__init__(
            optimizer,
            model,
            where="gradient",
            decay=None,
            layers=layers,
            overrides=overrides,
            reproducible=reproducible,
        )
        del vars(optimizer)["__reduce_ex__"]  # its copies need no warning

    def _place(self, decay: Decay) -> InStep:
        self.in_step = InStep(self._targets, decay, self._rule)
        return self.in_step


class InStep(GradientHooks):
    """Hooks that pass over the parameter groups that are centralized in the step itself.

    `step` is that step, which an optimizer calls when torch comes to a group.
    """

    def __init__(self, targets: Targets, decay: Decay, rule: Rule) -> None:
        self._rule = rule
        self._launches = Launches(rule)
        self._marked: dict[int, dict[Tensor, Weight]] = {}  # by the id of the group
        super().__init__(targets, decay)

    def step(self, group: Group, remember: Callable[[list[Tensor]], object]) -> list[Tensor]:
        """Centralize and update what of a group the kernels take.

        `remember` makes the state of parameters that have none yet.

        Returns
        -------
        list of torch.Tensor
            The parameters that are left to torch, their gradients centralized.
        """
        weights = self._marked.pop(id(group), None)
        if weights is None:  # the hooks have centralized it, or there are none in this step
            return cast("list[Tensor]", group["params"])
        optimizer = self._targets.optimizer
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [optimizer.state.get(p, {}) for p in parameters]
        if not all(states):
            remember([p for p, state in zip(parameters, states, strict=True) if not state])
            states = [optimizer.state.get(p, {}) for p in parameters]
        places = self._launches.step(group, parameters, states, [*map(weights.get, parameters)])
        left = [parameters[k] for k in places]
        found = with_gradient([weights[p] for p in left if p in weights])
        self._together.centralize_({coupled_rate(optimizer, group, None): found})
        return left

    @torch.no_grad()
    def fallback(self, group: Group) -> str:
        """Tell why the next step of a group will be that of torch; nothing if it will be ours.

        The first reason is told, though it may be one of but a few of its parameters.
        """
        reason = self._why_not() or self._why_not_group(group)
        if reason:
            return reason
        state = self._targets.optimizer.state
        try:
            weights = {weight.parameter: weight for weight in self._targets.weights()}
        except RuntimeError as error:  # that of a step
            return str(error)
        reasons = (
            self._launches.why_not(group, p, state.get(p, {}), weights.get(p))
            for p in group["params"]
            if p.requires_grad
        )
        return next(filter(None, reasons), "")

    def _by_group(self) -> Iterator[tuple[Group, list[Weight]]]:
        weights = {id(group): found for group, found in super()._by_group()}
        is_for_torch = bool(self._why_not())
        self._marked.clear()
        for group in self._targets.optimizer.param_groups:
            found = weights.get(id(group), [])
            if not (is_for_torch or self._why_not_group(group)):
                self._marked[id(group)] = {w.parameter: w for w, _ in with_gradient(found)}
            elif found:
                yield group, found

    def _why_not(self) -> str:
        optimizer = self._targets.optimizer
        if unwrap(type(optimizer).step) is not unwrap(self._rule.kind.step):
            return f"{type(optimizer).__name__} has a step of its own"
        if len(vars(optimizer)["_optimizer_step_pre_hooks"]) > 1:
            return "other hooks before the step may use the gradients"
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
        # Not even asked about without a parameter there: the answer takes a context of CUDA.
        device = next((p.device for p in group["params"] if is_for_kernels(p)), None)
        return "no parameter on a CUDA device" if device is None else _torch_cuda.why_not(device)
