"""The kernel's rules, such as a step of AdamW, and the numbers that each takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# The factor of the mean of gradients, the factor of the mean of weights, and further scalars.
Numbers = tuple[float, float, tuple[float, ...]]


class KernelRule(NamedTuple):
    """A rule of the kernel: its device function, and a function that computes its scalars."""

    kernel: str  # of `_triton_functions`
    written: int  # number of the first role that is written to
    numbers: Callable[..., Numbers]


def _numbers_of_centralize(*, strength: float, rate: float) -> Numbers:
    return strength, rate, (0.0,)  # the kernel cannot take an empty tuple


def _numbers_of_sgd(
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


def _numbers_of_adamw(
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


# Keyed by name and number of roles.
RULES = {
    ("centralize", 3): KernelRule("store", 2, _numbers_of_centralize),
    ("sgd", 2): KernelRule("sgd", 1, _numbers_of_sgd),
    ("sgd", 3): KernelRule("sgd_momentum", 1, _numbers_of_sgd),
    ("adamw", 4): KernelRule("adamw", 1, _numbers_of_adamw),
}
