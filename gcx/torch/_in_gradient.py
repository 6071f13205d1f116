"""Gradient Centralization of what an optimizer uses as the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gcx.torch._decay import Decay, Group, coupled_rate, keeps_mean_in_gradient
from gcx.torch._gradients import Rate, with_gradient
from gcx.torch._momentum import centralize_momentum
from gcx.torch._plan import Weight
from gcx.torch._targets import Targets
from gcx.torch._together import Together
from gcx.torch._untraced import untraced


class InGradient:
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

    @untraced
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

    @untraced
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
