"""The paper's own figures: Tables 1 and 2 of its supplement (ResNet-50 on CIFAR-100).

Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep Neural
Networks", ECCV 2020, supplementary material, section A3. The keys are the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.paper.statistics import Spread

__all__ = ["SETTING", "TABLE_1", "TABLE_2", "USUAL_RATE", "Figures"]

SETTING = "ResNet-50, CIFAR-100, bold as printed"


@dataclass(frozen=True)
class Figures:
    """Mean and standard deviation of the test accuracy, in percent.

    The supplement prints the figure with GC in bold in every column, and in one column
    the lower figure without GC as well.
    """

    without_gc: Spread
    with_gc: Spread
    both_bold: bool = False


def _figures(without_gc: float, sd: float, with_gc: float, sd_with: float, **bold: bool) -> Figures:
    return Figures(Spread(without_gc, sd), Spread(with_gc, sd_with), **bold)


# The learning rate that Table 1 is trained with, and the middle one of Table 2.
USUAL_RATE = {"SGDM": 0.1, "Adam": 0.001}

# By weight decay; SGDM, learning rate 0.1.
TABLE_1: dict[float, Figures] = {
    0.0: _figures(71.62, 0.31, 72.83, 0.29),
    1e-4: _figures(73.91, 0.35, 76.56, 0.31),
    2e-4: _figures(75.57, 0.33, 77.62, 0.37),
    5e-4: _figures(78.23, 0.42, 79.14, 0.33),
    1e-3: _figures(77.43, 0.30, 78.10, 0.36),
}

# By optimizer and learning rate; weight decay 5e-4.
TABLE_2: dict[tuple[str, float], Figures] = {
    ("SGDM", 0.05): _figures(76.81, 0.27, 78.12, 0.33),
    ("SGDM", 0.1): _figures(78.23, 0.42, 79.14, 0.33),
    ("SGDM", 0.2): _figures(76.53, 0.32, 77.71, 0.35),
    ("Adam", 0.0005): _figures(73.88, 0.46, 74.32, 0.55),
    ("Adam", 0.001): _figures(71.64, 0.56, 72.80, 0.62),
    ("Adam", 0.0015): _figures(70.63, 0.44, 71.22, 0.49, both_bold=True),
}
