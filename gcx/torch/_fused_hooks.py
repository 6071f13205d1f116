"""Gradient Centralization of an optimizer that leaves it to the kernels where these can step."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcx.backends import _torch_cuda
from gcx.torch._decay import Group, coupled_rate
from gcx.torch._fused_launches import Launches
from gcx.torch._fused_rules import Rule
from gcx.torch._gradients import with_gradient
from gcx.torch._hooks import GradientCentralization
from gcx.torch._in_gradient import InGradient
from gcx.torch._overrides import Overrides
from gcx.torch._plan import Layers, Weight
from gcx.torch._targets import Targets, keep_switches


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
        super().__init__(
            optimizer,
            model,
            where="gradient",
            decay=None,
            layers=layers,
            overrides=overrides,
            reproducible=reproducible,
        )
        self.remove()  # the hooks that centralize in each step, and the warning of copies
        self.in_step = InStep(self._targets, rule)
        self._hooks = [
            *self.in_step.hooks,
            optimizer.register_load_state_dict_pre_hook(keep_switches),
            optimizer.register_load_state_dict_post_hook(self._warn_if_idle),
        ]


class InStep(InGradient):
    """Hooks that pass over the parameter groups that are centralized in the step itself.

    `step` is that step, which an optimizer calls when torch comes to a group.
    """

    def __init__(self, targets: Targets, rule: Rule) -> None:
        self._rule = rule
        self._launches = Launches(rule)
        self._marked: dict[int, dict[Tensor, Weight]] = {}  # by the id of the group
        super().__init__(targets, decay=None)

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
        reason = self._why_not() or self._why_not_options(group)
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

    def _centralize(self) -> None:
        # Errors come here, before any group has been changed.
        weights = {
            id(group): {weight.parameter: weight for weight, _ in with_gradient(found)}
            for group, found in self._targets.by_group()
        }
        self._marked = {key: weights.get(key, {}) for key in self._of_kernels()}
        if not weights.keys() <= self._marked.keys():
            with self._passing_over(self._marked):
                super()._centralize()

    def _means_of_gradients(self) -> list[tuple[Weight, Tensor]]:
        with self._passing_over(self._of_kernels()):
            return super()._means_of_gradients()

    @contextmanager
    def _passing_over(self, groups: Container[int]) -> Iterator[None]:
        targets = self._targets
        self._targets = _Rest(targets, groups)
        try:
            yield
        finally:
            self._targets = targets

    def _of_kernels(self) -> set[int]:
        """Tell the groups of the kernels, so far as can be told before torch comes to them."""
        if self._why_not():
            return set()
        groups = self._targets.optimizer.param_groups
        return {id(group) for group in groups if not self._why_not_options(group)}

    def _why_not(self) -> str:
        optimizer = self._targets.optimizer
        if unwrap(type(optimizer).step) is not unwrap(self._rule.kind.step):
            return f"{type(optimizer).__name__} has a step of its own"
        if len(vars(optimizer)["_optimizer_step_pre_hooks"]) > 1:
            return "other hooks before the step may use the gradients"
        for attribute in ("grad_scale", "found_inf"):  # set by a GradScaler
            if getattr(optimizer, attribute, None) is not None:
                return f"{attribute} is set"
        return _torch_cuda.why_not()

    def _why_not_options(self, group: Group) -> str:
        for option, value in self._rule.fixed.items():
            if group[option] != value:
                return f"{option}={group[option]!r}"
        for option in self._rule.numbers:
            values = group[option] if isinstance(group[option], tuple) else (group[option],)
            if any(isinstance(value, Tensor) for value in values):
                return f"{option} is a tensor"
        return ""


class _Rest(Targets):
    """Targets without the groups that have these ids."""

    def __init__(self, targets: Targets, passed_over: Container[int]) -> None:
        self.optimizer = targets.optimizer
        self._targets = targets
        self._passed_over = passed_over

    def by_group(self) -> Iterator[tuple[Group, list[Weight]]]:
        """See `Targets`."""
        for group, weights in self._targets.by_group():
            if id(group) not in self._passed_over:
                yield group, weights
