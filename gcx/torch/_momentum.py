"""Momentum from before: running sums of gradients that were not centralized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gcx.torch._plan import Weight
from gcx.torch._warn import warn
from gcx.torch._working import working

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
    keeper = working(optimizer)
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
