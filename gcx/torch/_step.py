"""Hooks around the step of an optimizer: on the gradient before it, or on the update after it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import currentframe
from itertools import chain, repeat
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gcx._decisions import narrow_weight
from gcx._options import Options
from gcx.torch._optimizer import (
    Means,
    average_means,
    centralize_momentum,
    coupled_rate,
    find_average,
    inner_optimizer,
    momentum_has_mean,
    moves_by_gradient_only,
    shrinkage,
)
from gcx.torch._weights import (
    SWITCH,
    Group,
    Rate,
    T,
    Targets,
    Weak,
    Weight,
    centralize_,
    part_gradients,
    with_gradient,
)

P = ParamSpec("P")
Args = tuple[Any, ...]  # of a step
Kwargs = dict[str, Any]

# Packages whose frames can lie between a line of the user and a warning.
_TRAINERS = "accelerate", "lightning", "pytorch_lightning", "transformers"
_BETWEEN = frozenset({"copy", "gcx", "pickle", "torch", *_TRAINERS})


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Keep a function out of compiled programs, to which the parameters of a model are constant."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        # Not where the function is defined: this loads the compiler, which takes seconds.
        as_it_is: Callable[P, T] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return as_it_is(*args, **kwargs)

    return call


def warn(message: str) -> None:
    """Warn at the line of the user, below all frames of gcx, torch and trainers."""
    frame, level = currentframe(), 1
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_of_copies(optimizer: Optimizer, loss: str, remedy: str) -> None:
    """Let pickle and copy.deepcopy of an optimizer warn: torch drops the hooks."""
    find: Callable[[], Any] = Weak(optimizer)

    def reduce_with_warning(protocol: int) -> Any:
        found: Optimizer = find()
        reason = f"the copy of this {type(found).__name__} {loss}: hooks are not copied"
        warn(f"{reason}. Call {remedy}; or copy state_dict() instead")
        return type(found).__reduce_ex__(found, protocol)

    # They ask the instance first.
    vars(optimizer)["__reduce_ex__"] = reduce_with_warning


def find_owner(hooks: Mapping[int, object], kind: type[T]) -> T | None:
    """Find the object of a class among those whose methods are hooks."""
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def keep_switches(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Keep the switches of parameter groups that a checkpoint does not mention, as it is loaded."""
    here = [{k: v for k, v in g.items() if k == SWITCH} for g in optimizer.param_groups]
    # torch has an error for another number of groups.
    pairs = zip(chain(here, repeat({})), state_dict["param_groups"], strict=False)
    return {**state_dict, "param_groups": [{**switch, **group} for switch, group in pairs]}


class GradientHooks:
    """Hooks of an optimizer for ``where="gradient"``."""

    def __init__(self, targets: Targets, options: Options) -> None:
        self._targets = targets
        self._options = options
        optimizer = targets.get_optimizer()
        for group, _ in targets.by_group():
            coupled_rate(optimizer, group, options.decay)  # raises here what a step would raise
        self._centralize_momentum()
        self.handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_load_state_dict_post_hook(self._centralize_momentum),
        ]

    @not_compiled
    @torch.no_grad()
    def _before_step(self, _: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if not _has_closure(args, kwargs):
            self._centralize()
            return None
        # An optimizer may use gradients from before its closure, or ignore the closure. A closure
        # that adds to these gradients, and clips the sum, finds them as they were.
        found = with_gradient([weight for _, weights in self._by_group() for weight in weights])
        means = [(weight, weight.mean(grad)) for weight, grad in zip(*found, strict=True)]
        self._centralize()
        centralize = not_compiled(torch.no_grad()(self._centralize))

        def wrap(closure: Callable[..., Any]) -> Callable[..., Any]:
            def centralized(*args: Any, **kwargs: Any) -> Any:
                while means:
                    _restore_mean(*means.pop())
                loss = closure(*args, **kwargs)
                if self.handles:  # none if the closure has removed them
                    centralize()
                return loss

            return centralized

        return wrap_closures(wrap, args, kwargs)

    def _centralize(self) -> None:
        decay, optimizer = self._options.decay, self._targets.get_optimizer()
        by_rate: dict[Rate, list[Weight]] = {}
        for group, weights in self._by_group():
            by_rate.setdefault(coupled_rate(optimizer, group, decay), []).extend(weights)
        part_gradients(chain.from_iterable(by_rate.values()), self._targets.parameters)
        found = [(with_gradient(weights), rate) for rate, weights in by_rate.items()]
        for of_rate, rate in found:
            centralize_(*of_rate, rate, self._options.strength)

    def _by_group(self) -> list[tuple[Group, list[Weight]]]:
        """List the weights to centralize before a step; errors come before anything changes."""
        groups = self._targets.by_group()
        if groups is not self._groups:  # some may have been switched on
            self._centralize_momentum()
        return groups

    def _centralize_momentum(self, *_: Any) -> None:
        # After loading too: the checkpoint may come from a run without centralization.
        self._groups = self._targets.by_group()
        if self._options.strength != 1.0:  # the momentum of such a run has a mean
            return
        optimizer, decay = self._targets.get_optimizer(), self._options.decay
        due = [w for g, w in self._groups if not momentum_has_mean(optimizer, g, decay)]
        names, unknown = centralize_momentum(optimizer, chain.from_iterable(due))
        if unknown:
            warn(
                f"the momentum of {len(unknown)} weights ({unknown[0]}, ...) is kept in a form "
                "without a mean; if it is from before centralization, it moves their means"
            )
        if names:
            warn(
                f"the momentum of {len(names)} weights ({names[0]}, ...) is from before "
                "centralization, and would have gone on moving their means: it was centralized too"
            )


@torch.no_grad()
def _restore_mean(weight: Weight, mean: Tensor) -> None:
    if (grad := weight.parameter.grad) is not None:
        weight.subtract_(grad, weight.mean(grad) - mean)


class UpdateHooks:
    """Hooks of an optimizer for ``where="update"``."""

    def __init__(self, targets: Targets, options: Options) -> None:
        self._targets = targets
        self._options = options
        optimizer = targets.get_optimizer()
        groups = [group for group, _ in targets.by_group()]
        for group in groups:
            shrinkage(optimizer, group, options.decay)  # raises here what a step would raise
        averages = [find_average(optimizer, group) for group in groups]
        if not any(averages) and callable(getattr(optimizer, "eval", None)):
            warn(
                f"{type(optimizer).__name__} has an eval(), which may put other weights into the "
                "model. gcx does not know these, so their means may move"
            )
        self._moves_others = not moves_by_gradient_only(optimizer)
        self._may_be_narrow = True
        # A stack: a step that calls the step of its base class runs the hooks of both. If a step
        # raises, maxlen evicts its stale entry.
        steps = sum("step" in vars(base) for base in type(optimizer).__mro__)
        self._baselines: deque[tuple[list[_Baseline], dict[Tensor, Tensor]]] = deque(maxlen=steps)
        before = optimizer.register_step_pre_hook(self._remember_means)
        after = optimizer.register_step_post_hook(self._restore_means)
        # Hooks registered earlier may average the weights.
        vars(optimizer)["_optimizer_step_post_hooks"].move_to_end(after.id, last=False)
        self.handles: list[RemovableHandle] = [before, after]

    @not_compiled
    @torch.no_grad()
    def _remember_means(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        baselines: list[_Baseline] = []
        has_closure = _has_closure(args, kwargs)
        state = inner_optimizer(optimizer).state
        for group, weights in self._targets.by_group():
            factor = shrinkage(optimizer, group, self._options.decay)
            average = find_average(optimizer, group)
            # Frozen ones too: later hooks and closures may give them gradients.
            for weight in weights:
                parameter = weight.parameter
                mean = weight.mean(parameter)
                beside = average_means(average, group, state.get(parameter, {}), weight, mean)
                is_due = parameter.grad is not None and not has_closure
                baselines.append(_Baseline(weight, mean, factor, beside, is_due))
        # A closure may add groups, or switch them on.
        others = self._targets.others() if has_closure else ()
        self._baselines.append((baselines, {w.parameter: w.mean(w.parameter) for w in others}))

    @not_compiled
    @torch.no_grad()
    def _restore_means(self, optimizer: Optimizer, *_: Any) -> None:
        state = inner_optimizer(optimizer).state
        baselines, means = self._baselines.pop()
        for group, weights in self._targets.by_group() if means else ():
            factor = shrinkage(optimizer, group, self._options.decay)
            pairs = [(w, means[w.parameter]) for w in weights if w.parameter in means]
            baselines += [_Baseline(w, mean, factor, {}, False) for w, mean in pairs]
        for weight, mean, factor, beside, is_due in baselines:
            parameter = weight.parameter
            has_gradient = parameter.grad is not None or is_due
            if not (has_gradient or self._moves_others or parameter.requires_grad):
                continue
            # Without a gradient there is no decay, but perhaps the loop moved the weight.
            kept = mean if factor is None or not has_gradient else mean * factor
            self._restore(weight, parameter, kept)
            if self._may_be_narrow and mean.dtype != parameter.dtype:
                self._may_be_narrow = False
                warn(narrow_weight(weight.name, parameter.dtype))
            known = state.get(parameter, {}) if has_gradient else {}
            for key in beside.keys() & known.keys():
                self._restore(weight, known[key], beside[key])

    def _restore(self, weight: Weight, tensor: Tensor, mean: Tensor) -> None:
        moved, strength = weight.mean(tensor) - mean, self._options.strength
        weight.subtract_(tensor, moved if strength == 1.0 else moved * strength)


class _Baseline(NamedTuple):
    """The mean of a weight before a step, and the factor by which decay shrinks it."""

    weight: Weight
    mean: Tensor
    shrinkage: Rate
    beside: Means  # of the weights that the optimizer keeps beside it, after the step
    is_due: bool  # the step will use the gradient, and may free it


def _has_closure(args: Args, kwargs: Kwargs) -> bool:
    return any(map(callable, (*args[1:], *kwargs.values())))


def wrap_closures(
    wrap: Callable[[Callable[..., Any]], object], args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Wrap each function among the arguments of a step, the first of which is the optimizer."""

    def wrap_one(value: Any) -> Any:
        return wrap(value) if callable(value) else value

    return (args[0], *map(wrap_one, args[1:])), {k: wrap_one(v) for k, v in kwargs.items()}
