"""Cells and outcomes: shared by the study on small data and the one on CIFAR-100."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["BASE", "Cell", "Outcome"]

# The arm that all others are compared with: no Gradient Centralization.
BASE = "without"


@dataclass(frozen=True)
class Cell:
    """A column of a table: one way to train one network on one task."""

    task: str
    network: str
    optimizer: str
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Outcome:
    """What one arm gave in one cell.

    Runs of equal seeds in two arms are a pair: the same data, initial weights and batches.

    Attributes
    ----------
    arm : str
        `BASE`, or which centralization: ``"gradient"``, ``"update"`` ...
    accuracy : array, shape (seeds, checkpoints)
        On the test set, in percent. The last column is the final one.
    loss : array, shape (seeds, steps)
        On each batch in training (of each epoch, for CIFAR-100).
    checkpoints : array, shape (checkpoints,)
        After how many steps (epochs) the accuracy was taken.
    """

    cell: Cell
    arm: str
    seeds: tuple[int, ...]
    accuracy: Any
    loss: Any
    checkpoints: Any
