"""Hooks around the step of an optimizer: on the gradient before it, or on the update after it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from functools import wraps
from inspect import currentframe
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gcx._decisions import narrow_weight
from gcx._options import Options
from gcx.torch._optimizer import (
    Group,
    centralize_momentum,
    coupled_rate,
    momentum_has_mean,
    shrinkage,
)
from gcx.torch._targets import Targets
from gcx.torch._weights import Rate, Weight, centralize_, with_gradient

P = ParamSpec("P")
ResultT = TypeVar("ResultT")

# Packages whose frames can lie between a line of the user and a warning.
_TRAINERS = {"accelerate", "lightning", "pytorch_lightning", "transformers"}
_BETWEEN = frozenset({"copy", "gcx", "pickle", "torch"} | _TRAINERS)


def not_compiled(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
    """Keep a function out of torch.compile.

    A compiled program would treat the parameters of a model as constants, which each step has to
    check.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> ResultT:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        # Not where the function is defined: this loads the compiler, which takes seconds.
        as_it_is: Callable[P, ResultT] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return as_it_is(*args, **kwargs)

    return call


def warn(message: str) -> None:
    """Warn at the line of the user, below all frames of gcx, torch and trainers."""
    frame, level = currentframe(), 1
    while frame is not None and _package(frame.f_globals) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _package(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]


class GradientHooks:
    """Hooks of an optimizer for ``where="gradient"``."""

    def __init__(self, targets: Targets, options: Options) -> None:
        self._targets = targets
        self._options = options
        self._switches = targets.switches()
        optimizer = targets.optimizer
        for group, _ in targets.by_group():
            coupled_rate(optimizer, group, options.decay)  # raises here what a step would raise
        self._centralize_momentum()
        self.handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_load_state_dict_post_hook(self._centralize_momentum),
        ]

    @not_compiled
    @torch.no_grad()
    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        switches = self._targets.switches()
        if switches != self._switches:
            self._switches = switches
            self._centralize_momentum()
        if not any(map(callable, (*args[1:], *kwargs.values()))):
            self._centralize()
            return None
        # An optimizer may use gradients from before its closure, or ignore the closure. A closure
        # that adds to these gradients, and clips the sum, finds them as they were.
        means = self._means_of_gradients()
        self._centralize()

        def centralizing(closure: Any) -> Any:
            return self._wrap(closure, means) if callable(closure) else closure

        new_args = (args[0], *map(centralizing, args[1:]))
        return new_args, {name: centralizing(value) for name, value in kwargs.items()}

    def _wrap(
        self, closure: Callable[..., Any], means: list[tuple[Weight, Tensor]]
    ) -> Callable[..., Any]:
        def centralized(*args: Any, **kwargs: Any) -> Any:
            while means:
                _restore_mean_of_gradient(*means.pop())
            loss = closure(*args, **kwargs)
            if self.handles:  # none if the closure has removed them
                self._centralize_after_closure()
            return loss

        return centralized

    @not_compiled
    @torch.no_grad()
    def _centralize_after_closure(self) -> None:
        self._centralize()

    def _centralize(self) -> None:
        decay, optimizer = self._options.decay, self._targets.optimizer
        by_rate: dict[Rate, list[tuple[Weight, Tensor]]] = {}
        for group, weights in self._by_group():
            found = with_gradient(weights)
            if found:
                by_rate.setdefault(coupled_rate(optimizer, group, decay), []).extend(found)
        for rate, gradients in by_rate.items():
            centralize_(gradients, rate, self._options.strength)

    def _by_group(self) -> list[tuple[Group, list[Weight]]]:
        """List the weights to centralize before a step; errors come before anything changes."""
        return self._targets.by_group()

    def _centralize_momentum(self, *_: Any) -> None:
        # After loading too: the checkpoint may come from a run without centralization.
        if self._options.strength != 1.0:  # the momentum of such a run has a mean
            return
        optimizer, decay = self._targets.optimizer, self._options.decay
        weights = [
            weight
            for group, weights in self._targets.by_group()
            if not momentum_has_mean(optimizer, group, decay)
            for weight in weights
        ]
        names, unknown = centralize_momentum(optimizer, weights)
        if unknown:
            warn(
                f"the momentum of {len(unknown)} weights ({unknown[0]}, ...) is kept in a form "
                "without a mean. If it comes from gradients that were not centralized, it moves "
                "the means of these weights until it has decayed"
            )
        if names:
            warn(
                f"the momentum of {len(names)} weights ({names[0]}, ...) comes from gradients that "
                "were not centralized, and would have gone on moving their means: it was "
                "centralized too"
            )

    def _means_of_gradients(self) -> list[tuple[Weight, Tensor]]:
        found = with_gradient([weight for _, weights in self._by_group() for weight in weights])
        return [(weight, weight.mean(grad)) for weight, grad in found]


@torch.no_grad()
def _restore_mean_of_gradient(weight: Weight, mean: Tensor) -> None:
    grad = weight.parameter.grad
    if grad is not None:
        weight.subtract_(grad, weight.mean(grad) - mean)


class UpdateHooks:
    """Hooks of an optimizer for ``where="update"``."""

    def __init__(self, targets: Targets, options: Options) -> None:
        self._targets = targets
        self._options = options
        optimizer = targets.optimizer
        for group, _ in targets.by_group():
            shrinkage(optimizer, group, options.decay)  # raises here what a step would raise
        moving = (weight for weight in targets.weights() if _may_move(weight))
        narrow = [w for w in moving if torch.finfo(w.parameter.dtype).bits < 32]
        if narrow:
            warn(narrow_weight(narrow[0].name, narrow[0].parameter.dtype))
        # A stack: a step that calls the step of its base class runs the hooks of both. If a step
        # raises, maxlen evicts its stale entry.
        self._baselines: deque[list[_Baseline]] = deque(maxlen=_count_steps(type(optimizer)))
        self.handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._remember_means),
            optimizer.register_step_post_hook(self._restore_means),
        ]

    @not_compiled
    @torch.no_grad()
    def _remember_means(self, optimizer: Optimizer, *_: Any) -> None:
        baselines: list[_Baseline] = []
        for group, weights in self._targets.by_group():
            factor = shrinkage(optimizer, group, self._options.decay)
            moving = [weight for weight in weights if _may_move(weight)]
            baselines += [_Baseline(w, w.mean(w.parameter), factor) for w in moving]
        self._baselines.append(baselines)

    @not_compiled
    @torch.no_grad()
    def _restore_means(self, *_: Any) -> None:
        strength = self._options.strength
        for weight, mean, factor in self._baselines.pop():
            parameter = weight.parameter
            if factor is not None and parameter.grad is not None:  # else no step, and no decay
                mean = mean * factor  # noqa: PLW2901
            moved = weight.mean(parameter) - mean
            weight.subtract_(parameter, moved if strength == 1.0 else moved * strength)


class _Baseline(NamedTuple):
    """The mean of a weight before a step, and the factor by which decay shrinks it."""

    weight: Weight
    mean: Tensor
    shrinkage: Rate


def _may_move(weight: Weight) -> bool:
    """Return True if the parameter is trainable or still has a gradient."""
    return weight.parameter.requires_grad or weight.parameter.grad is not None


def _count_steps(kind: type[Optimizer]) -> int:
    """Count the steps that can run within one another: a class and its bases may have one each."""
    return sum("step" in vars(base) for base in kind.__mro__)
