"""Recorded launches, and gradients that are somewhere else in each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.device import Gpu, centralize, in_turn
from benchmarks.gpu.report import Measured
from benchmarks.throughput.models import MODELS
from benchmarks.throughput.on_torch import gradients

__all__ = ["changing_addresses", "replays"]

# Convolutions, and rows and columns of a transformer.
_WEIGHTS = (*MODELS["resnet50"].weights[:12], *MODELS["gpt2"].weights[1:6])
_DTYPES = ("float32", "bfloat16")
_REPLAYS, _STEPS, _KEPT = 5, 200, 7


def replays(gpu: Gpu) -> Iterator[Measured]:
    """Replay two graphs on other numbers, and compare with plain calls.

    One graph holds the launches for two lists of gradients, the other those for a third list.
    """
    for dtype in _DTYPES:
        lists = [gradients(_WEIGHTS, dtype, gpu.device) for _ in range(3)]
        calls = [partial(centralize, _WEIGHTS, grads) for grads in lists]
        graphs = [gpu.record(in_turn(calls[:2])), gpu.record(calls[2])]
        grads = [grad for each in lists for grad in each]
        count = 0
        for _ in range(_REPLAYS):
            for grad in grads:
                grad.normal_()
            copies = [[grad.clone() for grad in each] for each in lists]
            expected = [grad for each in copies for grad in centralize(_WEIGHTS, each)]
            gpu.release()  # memory of the graphs must stay
            in_turn(graphs)()
            gpu.wait()
            count += _count_differing(grads, expected)
        what = f"{dtype}: of {_REPLAYS} replays of {len(lists)} lists in {len(graphs)} graphs"
        yield Measured(what, count, 0, "differ")


def changing_addresses(gpu: Gpu) -> Iterator[Measured]:
    """Take steps with new gradients each, as after ``zero_grad(set_to_none=True)``."""
    for dtype in _DTYPES:
        numbers = gradients(_WEIGHTS, dtype, gpu.device)
        expected = centralize(_WEIGHTS, [number.clone() for number in numbers])
        kept: deque[Tensor] = deque(maxlen=_KEPT)  # so that addresses do not come back
        count = 0
        for step in range(_STEPS):
            grads = [number.clone() for number in numbers]
            centralize(_WEIGHTS, grads)
            count += _count_differing(grads, expected)
            kept.append(grads[step % len(grads)])
        what = f"{dtype}: of {_STEPS} steps with {len(numbers)} new gradients each"
        yield Measured(what, count, 0, "differ")


def _count_differing(found: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    return sum(not torch.equal(*pair) for pair in zip(found, expected, strict=True))
