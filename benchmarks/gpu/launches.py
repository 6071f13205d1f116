"""How few launches there are, and how soon the host is back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import gcx
from benchmarks.gpu.device import Gpu
from benchmarks.gpu.hooks import launching
from benchmarks.gpu.report import Measured
from benchmarks.throughput.models import DTYPES, MODELS
from benchmarks.throughput.on_torch import gradients
from gcx.backends import _torch_cuda

__all__ = ["counted", "host", "used"]

_HOST_UNCHANGED, _HOST_CHANGED = 30.0, 50.0


def used(_: Gpu) -> Iterator[Measured]:
    """See that the kernels run at all: else torch does the work, and misses most of the limits."""
    reason = _torch_cuda.why_not()
    if reason:
        msg = f"the kernels are not used: {reason}"
        raise RuntimeError(msg)
    yield Measured("torch: reasons not to use the kernels", 0, 0)


def counted(gpu: Gpu) -> Iterator[Measured]:
    """Kernels, copies and waits of one call."""
    for name in ("resnet50", "vit-b16", "gpt2"):
        model = MODELS[name]
        layouts = [weight.layout for weight in model.weights]
        for dtype in DTYPES:
            grads = gradients(model.weights, dtype, gpu.device)
            call = partial(gcx.centralize_many, grads, layouts=layouts, out=grads)
            seen = gpu.profile(call)
            what = f"{model.title}, {dtype}"
            yield Measured(f"{what}: kernels", seen.kernels, 2)
            yield Measured(f"{what}: copies", seen.copies, 1)
            yield Measured(f"{what}: waits of the host", seen.waits, 0)


def host(gpu: Gpu) -> Iterator[Measured]:
    """Time until the host is back, of the hooks of `gcx.torch` and of `gcx.centralize_many`.

    That function looks at each gradient anew, so its time has no limit, and is only told.
    """
    weights = MODELS["resnet50"].weights
    lists = [gradients(weights, "float32", gpu.device) for _ in range(2)]
    launch = launching(weights)
    unchanged = gpu.until_back(partial(launch, lists[0]))
    in_turn = cycle(lists)
    changed = gpu.until_back(lambda: launch(next(in_turn)))
    layouts = [weight.layout for weight in weights]
    many = partial(gcx.centralize_many, lists[0], layouts=layouts, out=lists[0])
    what = f"{len(weights)} gradients of ResNet-50"
    yield Measured(f"hooks, {what}, as before", 1e6 * unchanged, _HOST_UNCHANGED, "us")
    yield Measured(f"hooks, {what}, elsewhere each time", 1e6 * changed, _HOST_CHANGED, "us")
    yield Measured(f"gcx.centralize_many, {what}", 1e6 * gpu.until_back(many), None, "us")
