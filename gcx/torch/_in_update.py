"""Gradient Centralization of the displacement of the weights by a step."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gcx.torch._decay import Decay, shrinkage
from gcx.torch._plan import Weight
from gcx.torch._targets import Targets
from gcx.torch._untraced import untraced
from gcx.torch._warn import warn


class InUpdate:
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

    @untraced
    @torch.no_grad()
    def _remember_means(self, optimizer: Optimizer, *_: Any) -> None:
        baselines: list[_Baseline] = []
        for group, weights in self._targets.by_group():
            factor = shrinkage(optimizer, group, self._decay)
            moving = [weight for weight in weights if _may_move(weight)]
            baselines += [_Baseline(w, w.mean(w.parameter), factor) for w in moving]
        self._baselines.append(baselines)

    @untraced
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
