"""Momentum from before: running sums of gradients that were not centralized."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gcx.torch._plan import Weight


def centralize_momentum(
    optimizer: Optimizer, weights: Iterable[Weight], *, stacklevel: int
) -> None:
    """Take out of running sums of past gradients the mean that would go on moving the weights.

    Warns if there was any. That of centralized gradients has none and stays as it is, bit for bit.
    """
    buffers = [
        (weight, buffer)
        for weight in weights
        for buffer in _first_moments(optimizer.state.get(weight.parameter, {}))
    ]
    for weight, buffer in buffers:
        if buffer.shape != weight.parameter.shape:
            msg = (
                f"the momentum of {weight.name} has shape {tuple(buffer.shape)}, not that of the "
                "weight, so it cannot be centralized; use where='update'"
            )
            raise ValueError(msg)
    foreign = [(weight, buffer) for weight, buffer in buffers if _has_mean(weight, buffer)]
    for weight, buffer in foreign:
        weight.fan_in.centralize_(buffer)
    if foreign:
        msg = (
            f"the momentum of {len(foreign)} weights ({foreign[0][0].name}, ...) comes from "
            "gradients that were not centralized, and would have gone on moving their means: it "
            "was centralized too"
        )
        warnings.warn(msg, UserWarning, stacklevel=stacklevel + 1)


def _first_moments(state: dict[str, Any]) -> list[Tensor]:
    # Beside a square_avg (RMSprop), momentum is a sum of gradients already divided, not of these.
    keys = ("exp_avg",) if "square_avg" in state else ("exp_avg", "momentum_buffer")
    return [state[key].detach() for key in keys if isinstance(state.get(key), Tensor)]


def _has_mean(weight: Weight, buffer: Tensor) -> bool:
    """Whether the mean over the fan-in is more than rounding."""
    rounding = 16 * torch.finfo(buffer.dtype).eps * buffer.abs().max()
    return bool(weight.fan_in.mean(buffer).abs().max() > rounding)
