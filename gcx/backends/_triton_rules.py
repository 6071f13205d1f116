"""What can be done with centralized gradients: the rules of the Triton kernel, as it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["RULES", "Numbers", "Rule"]

# Strength of the mean of gradients, rate of that of weights, and what else a rule needs.
Numbers = tuple[float, float, tuple[float, ...]]


class Rule(NamedTuple):
    """How the kernel is told of a rule."""

    kernel: str  # function of `_triton_kernels`
    written: int  # the first role that is written to
    numbers: Callable[..., Numbers]


def _for_centralize(*, strength: float, rate: float) -> Numbers:
    return strength, rate, (0.0,)  # the kernel takes some numbers


def _for_sgd(
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> Numbers:
    sign = -1.0 if maximize else 1.0
    others = (sign, weight_decay, lr, momentum, 1 - dampening, first, nesterov)
    return 1.0, sign * weight_decay, tuple(map(float, others))


def _for_adamw(
    *,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    bias2_root: float,
    maximize: bool,
) -> Numbers:
    sign = -1.0 if maximize else 1.0
    others = (sign, decay, step_size, beta1, 1 - beta1, beta2, 1 - beta2, bias2_root, eps)
    return 1.0, 0.0, tuple(map(float, others))


# By name and number of roles.
RULES = {
    ("centralize", 3): Rule("store", 2, _for_centralize),
    ("sgd", 2): Rule("sgd", 1, _for_sgd),
    ("sgd", 3): Rule("sgd_momentum", 1, _for_sgd),
    ("adamw", 4): Rule("adamw", 1, _for_adamw),
}
