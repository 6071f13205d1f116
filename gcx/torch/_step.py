"""Gradient Centralization around a step: of the gradient before it, or of the update after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gcx.torch._calls import not_compiled, warn
from gcx.torch._optimizer import (
    Decay,
    Group,
    centralize_momentum,
    coupled_rate,
    keeps_mean_in_gradient,
    shrinkage,
)
from gcx.torch._targets import Targets
from gcx.torch._weights import Rate, Together, Weight, with_gradient


class GradientHooks:
    """Hooks of an optimizer for ``where="gradient"``."""

    def __init__(self, targets: Targets, decay: Decay) -> None:
        self._targets = targets
        self._decay: Decay = decay
        self._switches = targets.switches()
        self._together = Together()
        optimizer = targets.optimizer
        for group, _ in targets.by_group():
            coupled_rate(optimizer, group, decay)  # raises here what a step would raise
        self._centralize_momentum()
        self.hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_load_state_dict_post_hook(self._centralize_momentum),
        ]

    @not_compiled
    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._switches != self._targets.switches():
            self._switches = self._targets.switches()
            self._centralize_momentum()
        if not any(map(callable, (*args[1:], *kwargs.values()))):
            self._centralize()
            return None
        # An optimizer may use gradients from before its closure, or ignore the closure. A closure
        # that adds to these gradients, and clips the sum, finds them as they were.
        means = self._means_of_gradients()
        self._centralize()

        def centralizing(closure: Any) -> Any:
            return self._around(closure, means) if callable(closure) else closure

        new_args = (args[0], *map(centralizing, args[1:]))
        return new_args, {name: centralizing(value) for name, value in kwargs.items()}

    def _around(
        self, closure: Callable[..., Any], means: list[tuple[Weight, Tensor]]
    ) -> Callable[..., Any]:
        def centralized(*args: Any, **kwargs: Any) -> Any:
            while means:
                _restore_mean_of_gradient(*means.pop())
            loss = closure(*args, **kwargs)
            if self.hooks:  # none if the closure has removed this
                self._centralize()
            return loss

        return centralized

    @not_compiled
    @torch.no_grad()
    def _centralize(self) -> None:
        gradients: dict[Rate, list[tuple[Weight, Tensor]]] = {}
        for group, weights in self._by_group():
            found = with_gradient(weights)
            if found:
                rate = coupled_rate(self._targets.optimizer, group, self._decay)
                gradients.setdefault(rate, []).extend(found)
        self._together.centralize_(gradients)

    def _by_group(self) -> Iterator[tuple[Group, list[Weight]]]:
        """List what is to be centralized before a step; errors come before anything is changed."""
        return self._targets.by_group()

    def _centralize_momentum(self, *_: Any) -> None:
        # After loading too: the checkpoint may be of a run without centralization.
        optimizer = self._targets.optimizer
        weights = [
            weight
            for group, weights in self._targets.by_group()
            if not keeps_mean_in_gradient(optimizer, group, self._decay)
            for weight in weights
        ]
        centralize_momentum(optimizer, weights)

    @torch.no_grad()
    def _means_of_gradients(self) -> list[tuple[Weight, Tensor]]:
        found = with_gradient(weight for _, weights in self._by_group() for weight in weights)
        return [(weight, weight.mean(grad)) for weight, grad in found]


@torch.no_grad()
def _restore_mean_of_gradient(weight: Weight, mean: Tensor) -> None:
    grad = weight.parameter.grad
    if grad is not None:
        weight.fan_in.subtract_(grad, weight.mean(grad) - mean)


class UpdateHooks:
    """Hooks of an optimizer for ``where="update"``."""

    def __init__(self, targets: Targets, decay: Decay) -> None:
        self._targets = targets
        self._decay: Decay = decay
        optimizer = targets.optimizer
        for group, _ in targets.by_group():
            shrinkage(optimizer, group, decay)  # raises here what a step would raise
        _warn_of_low_precision([weight for weight in targets.weights() if _may_move(weight)])
        # A stack, since a step that calls the step of its base class runs the hooks of both.
        # What a step that raised has left behind falls off the far end.
        self._baselines: deque[list[_Baseline]] = deque(maxlen=_count_steps(type(optimizer)))
        self.hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._remember_means),
            optimizer.register_step_post_hook(self._restore_means),
        ]

    @not_compiled
    @torch.no_grad()
    def _remember_means(self, optimizer: Optimizer, *_: Any) -> None:
        baselines: list[_Baseline] = []
        for group, weights in self._targets.by_group():
            factor = shrinkage(optimizer, group, self._decay)
            moving = [weight for weight in weights if _may_move(weight)]
            baselines += [_Baseline(w, w.mean(w.parameter), factor) for w in moving]
        self._baselines.append(baselines)

    @not_compiled
    @torch.no_grad()
    def _restore_means(self, *_: Any) -> None:
        for baseline in self._baselines.pop():
            _restore_mean(*baseline)


class _Baseline(NamedTuple):
    """What to hold on to in the update of a weight: its mean, but for the decay of that."""

    weight: Weight
    mean: Tensor
    shrinkage: float | Tensor | None


def _restore_mean(weight: Weight, mean: Tensor, shrinkage: float | Tensor | None) -> None:
    parameter = weight.parameter
    if shrinkage is not None and parameter.grad is not None:  # else the optimizer passes it over
        mean = mean * shrinkage
    weight.fan_in.subtract_(parameter, weight.mean(parameter) - mean)


def _may_move(weight: Weight) -> bool:
    """Whether a step can move it: it is not frozen, or was not when its gradient was computed."""
    return weight.parameter.requires_grad or weight.parameter.grad is not None


def _warn_of_low_precision(weights: list[Weight]) -> None:
    narrow = [w for w in weights if torch.finfo(w.parameter.dtype).bits < 32]
    if narrow:
        weight = narrow[0]
        warn(
            f"{weight.name} is {weight.parameter.dtype}: rounding the weights loses most of what "
            "where='update' does; keep float32 weights, or use where='gradient'"
        )


def _count_steps(kind: type[Optimizer]) -> int:
    """Count the steps that can run within one another: those of a class and its bases."""
    return sum("step" in vars(base) for base in kind.__mro__)
