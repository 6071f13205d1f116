"""What an optimizer adds to a gradient, weight decay, and what it remembers of it, momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from inspect import unwrap
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gcx.torch._calls import warn
from gcx.torch._weights import Weight

Decay = Literal["inside", "outside"] | None
Group = dict[str, Any]


def coupled_rate(optimizer: Optimizer, group: Group, decay: Decay) -> float | Tensor | None:
    """Factor c such that the optimizer sees ``grad + c * w``, if the projection is of that sum.

    None if there is no such decay, or it stays outside. Raises a ValueError if `decay` is needed
    or does not fit the optimizer.
    """
    couples = _couples(optimizer, group)
    rate = _rate(group)
    kind = type(optimizer).__name__
    if decay == "inside" and couples is False:
        msg = (
            f"decay='inside' with where='gradient' needs an optimizer that adds weight_decay * w "
            f"to the gradient, and {kind} shrinks the weights apart; use where='update'"
        )
        raise ValueError(msg)
    if decay is None and couples is None and _is_some(rate):
        msg = (
            f"does {kind} add weight_decay * w to the gradient? Then say decay='inside', so that "
            "it is projected as well; if it shrinks the weights apart, say decay='outside'"
        )
        raise ValueError(msg)
    is_inside = couples if decay is None else decay == "inside"
    if not is_inside or not _is_some(rate):
        return None
    if group.get("maximize"):
        rate = -rate  # the sign of the gradient is turned before decay is added
    # Set by a GradScaler while a fused optimizer steps on gradients that are still scaled.
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return rate if scale is None else rate * scale


def keeps_mean_in_gradient(optimizer: Optimizer, group: Group, decay: Decay) -> bool:
    """Whether what the optimizer uses has a mean in spite of the projection: that of the decay."""
    is_left_out = decay == "outside" and _couples(optimizer, group) is not False
    return is_left_out and _is_some(_rate(group))


def shrinkage(optimizer: Optimizer, group: Group, decay: Decay) -> float | Tensor | None:
    """Factor by which the coming step shrinks the weights apart from the gradient.

    None if decay is inside the projection. Raises a ValueError if it cannot be outside.
    """
    if decay != "outside":
        return None
    if _couples(optimizer, group):
        msg = (
            f"decay='outside' with where='update' needs an optimizer that shrinks the weights "
            f"apart, and {type(optimizer).__name__} adds weight_decay * w to the gradient; use "
            "where='gradient'"
        )
        raise ValueError(msg)
    if group["lr"] is None:
        msg = (
            f"decay='outside' with where='update' needs to know by how much a step shrinks the "
            f"weights, and this {type(optimizer).__name__} finds its learning rate by itself; "
            "leave decay inside"
        )
        raise ValueError(msg)
    lost: float | Tensor = group["lr"] * _rate(group)
    # Set by a GradScaler: unless zero, a fused optimizer leaves the weights where they are.
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return 1 - (lost if found_inf is None else lost * (found_inf == 0))


def _rate(group: Group) -> float | Tensor:
    rate: float | Tensor | None = group.get("weight_decay")
    return 0.0 if rate is None else rate


def _is_some(rate: float | Tensor) -> bool:
    # A tensor counts as decay unseen: to look at it would wait for the device at every step.
    return isinstance(rate, Tensor) or rate != 0


def _couples(optimizer: Optimizer, group: Group) -> bool | None:
    """Whether weight decay is added to the gradient; None if nobody knows."""
    if "decoupled_weight_decay" in group:
        return not group["decoupled_weight_decay"]
    # By what the step does: a subclass with a step of its own may decay as it likes.
    step = _step_of(type(inner_optimizer(optimizer)))
    if step in _COUPLED:
        return True
    return False if step in _DECOUPLED else None


def _step_of(kind: type[Optimizer]) -> Callable[..., Any]:
    # The function itself: torch wraps the step of a class when its first instance is made.
    step: Callable[..., Any] = unwrap(kind.step)
    return step


def _steps_of(*names: str) -> set[Callable[..., Any]]:
    kinds = (getattr(torch.optim, name, None) for name in names)
    return {_step_of(kind) for kind in kinds if kind is not None}  # Muon came with torch 2.9


_COUPLED = _steps_of(
    "Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD"
)
_DECOUPLED = _steps_of("Adafactor", "AdamW", "Muon")


# As it is kept: of one parameter, or of all those of LBFGS in a row.
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
# Beside these it is a sum of gradients already divided: in RMSprop, and Adafactor of transformers.
_DIVIDES_BEFORE = {"exp_avg": {"exp_avg_sq_row"}, "momentum_buffer": {"square_avg"}}
_FLAT = ("d", "prev_flat_grad")
_FLAT_HISTORIES = ("old_dirs", "old_stps")


@torch.no_grad()
def centralize_momentum(optimizer: Optimizer, weights: Iterable[Weight]) -> None:
    """Take out of what remains of past gradients the mean that would go on moving the weights.

    Warns if there was any. That of centralized gradients has none and stays as it is, bit for bit.
    """
    keeper = inner_optimizer(optimizer)
    momentum = [
        (weight, buffer) for weight in weights for buffer in _buffers(keeper, weight.parameter)
    ]
    for weight, buffer in momentum:
        if buffer.shape != weight.parameter.shape:
            msg = (
                f"the momentum of {weight.name} has shape {tuple(buffer.shape)}, not that of the "
                "weight, so it cannot be centralized; use where='update'"
            )
            raise ValueError(msg)
    foreign = [(weight, buffer) for weight, buffer in momentum if _has_mean(weight, buffer)]
    for weight, buffer in foreign:
        weight.fan_in.subtract_(buffer, weight.mean(buffer))
    names = dict.fromkeys(weight.name for weight, _ in foreign)
    if names:
        warn(
            f"the momentum of {len(names)} weights ({next(iter(names))}, ...) comes from gradients "
            "that were not centralized, and would have gone on moving their means: it was "
            "centralized too"
        )


def _buffers(optimizer: Optimizer, parameter: Tensor) -> Iterator[Tensor]:
    """List what an optimizer remembers of the gradients of a parameter, to be written to."""
    if isinstance(optimizer, LBFGS):
        yield from _parts_of_flat_memory(optimizer, parameter)
        return
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    for key in _FIRST_MOMENTS:
        if isinstance(state.get(key), Tensor) and not _DIVIDES_BEFORE[key] & state.keys():
            yield state[key]


def _parts_of_flat_memory(optimizer: LBFGS, parameter: Tensor) -> Iterator[Tensor]:
    parameters: list[Tensor] = optimizer.param_groups[0]["params"]
    memory = optimizer.state.get(parameters[0], {})
    flat = [memory[key] for key in _FLAT if isinstance(memory.get(key), Tensor)]
    flat += [vector for key in _FLAT_HISTORIES for vector in memory.get(key, ())]
    sizes = [_real(p).numel() for p in parameters]
    place = next(k for k, p in enumerate(parameters) if p is parameter)
    for vector in flat:
        part = vector.split(sizes)[place].view_as(_real(parameter))
        yield torch.view_as_complex(part) if parameter.is_complex() else part


def _real(parameter: Tensor) -> Tensor:
    return torch.view_as_real(parameter) if parameter.is_complex() else parameter


def _has_mean(weight: Weight, buffer: Tensor) -> bool:
    """Whether the mean over the fan-in is more than rounding, of itself or of the elements."""
    if buffer.numel() == 0:
        return False
    mean = weight.mean(buffer)
    of_mean, of_elements = (torch.finfo(x.dtype).eps for x in (mean, buffer))
    rounding = of_mean + of_elements / sqrt(weight.fan_in.size(buffer))
    return bool(mean.abs().max() > 16 * rounding * buffer.abs().max())


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Find the optimizer that steps and remembers.

    That of torch.distributed.optim.ZeroRedundancyOptimizer is one for the share of a process.
    """
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer
