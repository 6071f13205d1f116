"""Tasks on scikit-learn's scanned digits: 1797 images of 8x8 pixels, 10 classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["ALL", "FEW", "Draw", "Images", "Task"]

BATCH = 32
TEST_PART = 1 / 3


class Images(NamedTuple):
    """Images (n, 8, 8, 1), scaled to mean 0 and variance 1 over the training part, and classes."""

    x: Any
    y: Any


class Draw(NamedTuple):
    """What a seed decides of the data: which images each step sees, and under which labels."""

    batches: Any  # (steps, batch), indices into the training images
    labels: Any  # (training images,)


@dataclass(frozen=True)
class Task:
    """Learn `classes` from `images_a_class` labelled images each, or from all there are.

    Of the labels of the training images, the part `noise` is drawn anew at random.
    """

    name: str
    images_a_class: int | None = None
    noise: float = 0.0
    classes: tuple[int, ...] = tuple(range(10))
    steps: int = 180

    def __post_init__(self) -> None:
        labelled = len(self.classes) * (self.images_a_class or BATCH)
        if labelled < BATCH:
            msg = f"{labelled} labelled images do not fill a batch of {BATCH}; label more"
            raise ValueError(msg)

    def train(self) -> Images:
        """All images of the training part, which `Draw` refers to."""
        return _split()[0]

    def test(self) -> Images:
        """Images of the test part, the same for all seeds."""
        x, y = _split()[1]
        chosen = np.isin(y, self.classes)
        return Images(x[chosen], y[chosen])

    def draw(self, seed: int) -> Draw:
        """Labelled images, noise and batches of a seed, the same for every way to train."""
        rng = np.random.default_rng((seed, 1))
        y = self.train().y
        labelled = np.concatenate([self._labelled(rng, y, digit) for digit in self.classes])
        wrong = rng.random(len(y)) < self.noise
        labels = np.where(wrong, rng.choice(self.classes, len(y)), y)
        return Draw(_batches(rng, labelled, self.steps), labels)

    def _labelled(self, rng: np.random.Generator, y: Any, digit: int) -> Any:
        return rng.permutation(np.flatnonzero(y == digit))[: self.images_a_class]


ALL = Task("digits, all images")
FEW = Task("digits, 20 images a class", images_a_class=20)


def _batches(rng: np.random.Generator, labelled: Any, steps: int) -> Any:
    """Shuffle anew for each epoch, and drop what does not fill a batch, as the paper does."""
    per_epoch = len(labelled) // BATCH
    epochs = -(-steps // per_epoch)
    orders = [rng.permutation(labelled)[: per_epoch * BATCH] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, BATCH)[:steps].astype(np.int32)


@cache
def _split() -> tuple[Images, Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=TEST_PART, stratify=y, random_state=0)
    train_x, test_x, train_y, test_y = parts
    mean, deviation = train_x.mean(), train_x.std()
    return tuple(
        Images(((x - mean) / deviation).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32))
        for x, y in ((train_x, train_y), (test_x, test_y))
    )  # type: ignore[return-value]
