"""The number of launches, and the time until the host is back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle

from benchmarks.gpu.device import Gpu, centralize
from benchmarks.gpu.report import Measured
from benchmarks.throughput.models import DTYPES, MODELS
from benchmarks.throughput.on_torch import gradients
from benchmarks.throughput.timing import Call

__all__ = ["counted", "host"]

# Rows take one launch; columns, which GPT-2 has, two.
_LAUNCHES = {"resnet50": 1, "vit-b16": 1, "gpt2": 3}
_HOST = 60.0


def counted(gpu: Gpu) -> Iterator[Measured]:
    """Kernels, copies and waits of a call whose gradients have just moved."""
    for name, launches in _LAUNCHES.items():
        model = MODELS[name]
        for dtype in DTYPES:
            lists = cycle([gradients(model.weights, dtype, gpu.device) for _ in range(2)])
            seen = gpu.profile(lambda: centralize(model.weights, next(lists)))  # noqa: B023
            what = f"{model.title}, {dtype}, new addresses"
            yield Measured(f"{what}: kernels", seen.kernels, launches)
            yield Measured(f"{what}: copies", seen.copies, 0)
            yield Measured(f"{what}: waits of the host", seen.waits, 0)


def host(gpu: Gpu) -> Iterator[Measured]:
    """Time until `gcx.centralize_many` is back: the same list each time, and lists in turn."""
    weights = MODELS["resnet50"].weights
    lists = [gradients(weights, "float32", gpu.device) for _ in range(2)]
    in_turn = cycle(lists)
    ways: dict[str, Call] = {
        "the same list": partial(centralize, weights, lists[0]),
        "new addresses each time": lambda: centralize(weights, next(in_turn)),
    }
    for way, call in ways.items():
        what = f"{len(weights)} gradients of ResNet-50, {way}"
        yield Measured(what, 1e6 * gpu.until_back(call), _HOST, "us")
