"""Tasks: which samples of a data set each seed draws, under which labels, in which batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.paper.data import Samples, parts

__all__ = ["ALL", "BATCH", "FEW", "Draw", "Task"]

BATCH = 32


class Draw(NamedTuple):
    """What a seed decides of the data: which samples each step sees, and under which labels."""

    batches: Any  # (steps, batch), indices into the training part
    labels: Any  # (training samples,)


@dataclass(frozen=True)
class Task:
    """Learn `classes` from `images_a_class` labelled images each, or from all there are.

    Of the labels of the training images, the part `noise` is drawn anew at random. Without classes
    it is a regression, on all samples there are.
    """

    name: str
    images_a_class: int | None = None
    noise: float = 0.0
    classes: tuple[int, ...] = tuple(range(10))
    steps: int = 180
    data: str = "digits"
    checkpoints: int = 12

    def __post_init__(self) -> None:
        labelled = len(self.classes) * (self.images_a_class or BATCH)
        if self.classes and labelled < BATCH:
            raise ValueError(
                f"{labelled} labelled images do not fill a batch of {BATCH}; label more"
            )

    def train(self) -> Samples:
        """All samples of the training part, which `Draw` refers to."""
        return parts(self.data).train

    def test(self) -> Samples:
        """Samples of the test part, the same for all seeds."""
        x, y = parts(self.data).test
        chosen = self.chosen(y)
        return Samples(x[chosen], y[chosen])

    def chosen(self, y: Any) -> Any:
        """Find the indices of the labels that are of the task."""
        return np.flatnonzero(np.isin(y, self.classes) | (not self.classes))

    def draw(self, seed: int) -> Draw:
        """Labelled samples, noise and batches of a seed, the same for every way to train."""
        rng = np.random.default_rng((seed, 1))
        y = self.train().y
        if not self.classes:
            return Draw(_batches(rng, np.arange(len(y)), self.steps), y)
        labelled = np.concatenate([self._labelled(rng, y, label) for label in self.classes])
        wrong = rng.random(len(y)) < self.noise
        labels = np.where(wrong, rng.choice(self.classes, len(y)), y)
        return Draw(_batches(rng, labelled, self.steps), labels)

    def _labelled(self, rng: np.random.Generator, y: Any, label: int) -> Any:
        return rng.permutation(np.flatnonzero(y == label))[: self.images_a_class]


ALL = Task("digits, all images")
FEW = Task("digits, 20 images a class", images_a_class=20)


def _batches(rng: np.random.Generator, labelled: Any, steps: int) -> Any:
    """Shuffle anew for each epoch, and drop what does not fill a batch, as the paper does."""
    per_epoch = len(labelled) // BATCH
    epochs = -(-steps // per_epoch)
    orders = [rng.permutation(labelled)[: per_epoch * BATCH] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, BATCH)[:steps].astype(np.int32)
