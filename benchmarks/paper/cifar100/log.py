"""The log of a run: a row for each epoch."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from benchmarks.paper.files import write_whole

__all__ = ["Epoch", "write_log"]


class Epoch(NamedTuple):
    """How an epoch went; accuracies in percent, that in training on the augmented images."""

    epoch: int  # the first is 1
    seconds: float
    learning_rate: float
    training_loss: float
    training_accuracy: float
    test_loss: float
    test_accuracy: float


def write_log(path: Path, epochs: Iterable[Epoch]) -> None:
    """Write all rows, as CSV.

    The file is written anew each time, so that a kill can neither cut a row nor leave two of one
    epoch.
    """
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([Epoch._fields, *epochs])
    write_whole(path, lambda file: file.write(text.getvalue().encode()))
