"""Recorded launches, and gradients that are somewhere else in each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import gcx
from benchmarks.gpu.device import Gpu
from benchmarks.gpu.hooks import launching
from benchmarks.gpu.report import Measured
from benchmarks.throughput.models import MODELS
from benchmarks.throughput.on_torch import gradients

__all__ = ["changing_addresses", "replays"]

# Convolutions, and rows and columns of a transformer.
_WEIGHTS = (*MODELS["resnet50"].weights[:12], *MODELS["gpt2"].weights[1:6])
_LAYOUTS = [weight.layout for weight in _WEIGHTS]
_DTYPES = ("float32", "bfloat16")
_REPLAYS, _STEPS, _KEPT = 5, 200, 7


def replays(gpu: Gpu) -> Iterator[Measured]:
    """Replay a recorded launch on other numbers, and compare with a plain call."""
    for dtype in _DTYPES:
        grads = gradients(_WEIGHTS, dtype, gpu.device)
        replay = gpu.recorded(partial(launching(_WEIGHTS), grads))
        count = 0
        for _ in range(_REPLAYS):
            for grad in grads:
                grad.normal_()
            expected = gcx.centralize_many(grads, layouts=_LAYOUTS)
            replay()
            gpu.wait()
            count += _differing(grads, expected)
        what = f"{dtype}: of {_REPLAYS} replays of {len(grads)} gradients"
        yield Measured(what, count, 0, "differ")


def changing_addresses(gpu: Gpu) -> Iterator[Measured]:
    """Take steps with new gradients each, as after ``zero_grad(set_to_none=True)``."""
    for dtype in _DTYPES:
        numbers = gradients(_WEIGHTS, dtype, gpu.device)
        expected = gcx.centralize_many(numbers, layouts=_LAYOUTS)
        launch = launching(_WEIGHTS)
        kept: deque[Tensor] = deque(maxlen=_KEPT)  # in the way of what comes next
        count = 0
        for step in range(_STEPS):
            grads = [number.clone() for number in numbers]
            launch(grads)
            count += _differing(grads, expected)
            kept.append(grads[step % len(grads)])
        what = f"{dtype}: of {_STEPS} steps with {len(numbers)} new gradients each"
        yield Measured(what, count, 0, "differ")


def _differing(found: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    return sum(not torch.equal(*pair) for pair in zip(found, expected, strict=True))
