"""The paper's own figures: Tables 1 and 2 of its supplement (ResNet-50 on CIFAR-100).

Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep Neural
Networks", ECCV 2020, supplementary material.

The keys are the columns, as the supplement has them. A column whose figures are None is printed as
not at hand: write in only what you read in the supplement itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.paper.statistics import Spread

__all__ = ["NOT_AT_HAND", "SETTING", "TABLE_1", "TABLE_2", "USUAL_RATE", "Figures"]

SETTING = "ResNet-50, CIFAR-100"
NOT_AT_HAND = (
    "The paper's own figures are not at hand: no copy of its supplement could be read, and figures "
    "from memory are none."
)


@dataclass(frozen=True)
class Figures:
    """Mean and standard deviation of the test accuracy, in percent."""

    without_gc: Spread
    with_gc: Spread


# The learning rate that Table 1 is trained with, and the middle one of Table 2.
USUAL_RATE = {"SGDM": 0.1, "Adam": 0.001}

# By weight decay; SGDM, learning rate 0.1.
TABLE_1: dict[float, Figures | None] = {
    0.0: None,
    1e-4: None,
    2e-4: None,
    5e-4: None,
    1e-3: None,
}

# By optimizer and learning rate; weight decay 5e-4.
TABLE_2: dict[tuple[str, float], Figures | None] = {
    ("SGDM", 0.05): None,
    ("SGDM", 0.1): None,
    ("SGDM", 0.2): None,
    ("Adam", 0.0005): None,
    ("Adam", 0.001): None,
    ("Adam", 0.0015): None,
}
