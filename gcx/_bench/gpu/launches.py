"""How few launches there are, and how soon the host is back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import gcx
from gcx._bench.gpu.device import Gpu
from gcx._bench.gpu.report import Measured
from gcx._bench.models import DTYPES, MODELS
from gcx._bench.on_torch import gradients

__all__ = ["counted", "host", "used"]

_HOST_UNCHANGED, _HOST_CHANGED = 30.0, 50.0


def used(_: Gpu) -> Iterator[Measured]:
    """See that the kernels run at all: else torch does the work, and misses most of the limits."""
    from gcx.backends._torch_cuda import why_not

    reason = why_not()
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
    """Time of the hook that centralizes before each step, until it is back."""
    from gcx.backends._torch_cuda import Launches

    weights = MODELS["resnet50"].weights
    axes = [weight.axes for weight in weights]
    lists = [gradients(weights, "float32", gpu.device) for _ in range(2)]
    launches = Launches()
    left = launches.centralize_(lists[0], axes)
    if left:
        msg = f"the kernels do not take gradients {left}"
        raise RuntimeError(msg)
    unchanged = gpu.until_back(lambda: launches.centralize_(lists[0], axes))
    in_turn = cycle(lists)
    changed = gpu.until_back(lambda: launches.centralize_(next(in_turn), axes))
    what = f"{len(weights)} gradients of ResNet-50"
    yield Measured(f"{what}, as before", 1e6 * unchanged, _HOST_UNCHANGED, "us")
    yield Measured(f"{what}, elsewhere each time", 1e6 * changed, _HOST_CHANGED, "us")
