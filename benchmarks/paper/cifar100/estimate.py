"""How long the study takes, from a few steps of it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
import torch

from benchmarks.paper.cifar100.archive import SIDE, Archive, Split
from benchmarks.paper.cifar100.settings import Setting
from benchmarks.paper.cifar100.training import Data, Training

__all__ = ["random_archive", "seconds_of_an_epoch", "spoken"]

_WARM_UP, _MEASURED = 2, 3

_UNITS = {"d": 86400, "h": 3600, "min": 60}


def random_archive() -> Archive:
    """Make up images as many as those of CIFAR-100: the time of a step does not depend on them."""
    random = np.random.default_rng(0)

    def split(n: int) -> Split:
        images = random.integers(256, size=(n, SIDE, SIDE, 3), dtype=np.uint8)
        return Split(images, random.integers(100, size=n))

    return Archive(split(50_000), split(10_000), classes=100)


def seconds_of_an_epoch(setting: Setting, data: Data, device: torch.device) -> float:
    """Measure steps of training and of testing, and multiply."""
    size = setting.scale.batch
    few = data._replace(test_images=data.test_images[:size], test_labels=data.test_labels[:size])
    training = Training(setting, few, device)
    batch = next(training.batches())
    step = _seconds(lambda: training.step(*batch), device)
    test = _seconds(training.test, device)
    return step * (len(data.images) // size) + test * len(data.test_images) / len(few.test_images)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of some calls, after the first ones, which choose algorithms and allocate."""
    times = []
    for _ in range(_WARM_UP + _MEASURED):
        start = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - start)
    return median(times[_WARM_UP:])


def spoken(seconds: float) -> str:
    """Write a time in two units, or in seconds if it is less than a minute."""
    rest, parts = round(seconds), []
    for unit, size in _UNITS.items():
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or f"{seconds:.1f} s"
