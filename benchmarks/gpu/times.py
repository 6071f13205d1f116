"""Times on the GPU, beside that of a copy in the same minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

import gcx
from benchmarks.gpu.device import COPY, Gpu
from benchmarks.gpu.hooks import launching
from benchmarks.gpu.report import Measured
from benchmarks.throughput.models import DTYPES, MODELS, Model, output_first
from benchmarks.throughput.on_torch import expression, gradients, peers
from benchmarks.throughput.timing import Call

__all__ = ["against_loops", "of_copies", "of_models"]

# Bytes a second that a copy reads and writes on the GPU for which the limits were set, an H200.
_COPY_SPEED = 4.3e12
_FASTER = 8.0


class _Limit(NamedTuple):
    """What a model may take, as a function of its bytes and of the time of a byte in a copy."""

    model: Model
    seconds: Callable[[str, float, float], float]


def _of_the_copy(factor: float, more: float) -> Callable[[str, float, float], float]:
    return lambda _dtype, size, per_byte: factor * size * per_byte + more


def _resnet(dtype: str, _size: float, per_byte: float) -> float:
    return {"float32": 60e-6, "bfloat16": 36e-6}[dtype] * _COPY_SPEED * per_byte


_BRIEF = 3  # of them
_LIMITS = (
    _Limit(MODELS["resnet50"], _resnet),
    _Limit(MODELS["vit-b16"], _of_the_copy(1.10, 4e-6)),
    _Limit(MODELS["gpt2"], _of_the_copy(1.10, 4e-6)),
    _Limit(output_first(MODELS["gpt2"]), _of_the_copy(1.10, 4e-6)),
    _Limit(MODELS["gpt2-xl"], _of_the_copy(1.10, 4e-6)),
    _Limit(MODELS["llama3-8b-slice"], _of_the_copy(1.08, 0.0)),
)


def of_models(gpu: Gpu) -> Iterator[Measured]:
    """All gradients of a model, in place."""
    for model, limit in _LIMITS[: _BRIEF if gpu.is_brief else None]:
        for dtype, itemsize in DTYPES.items():
            calls = gpu.rotation(model.weights, dtype, partial(_centralize, model))
            found = gpu.times({"gcx": calls})
            del calls
            gpu.release()
            allowed = limit(dtype, 2 * model.elements * itemsize, found[COPY])
            yield Measured(f"{model.title}, {dtype}", 1e6 * found["gcx"], 1e6 * allowed, "us")


def of_copies(gpu: Gpu) -> float:
    """Bytes a second that a copy reads and writes."""
    return 1 / gpu.times({})[COPY]


def against_loops(gpu: Gpu) -> Iterator[Measured]:
    """Time what the hooks of `gcx.torch` launch for ResNet-50, against loops, end to end."""
    model = MODELS["resnet50"]
    for dtype in DTYPES:
        grads = gradients(model.weights, dtype, gpu.device)
        axes = [weight.axes for weight in model.weights]
        candidates: dict[str, Call] = {
            "gcx": partial(launching(model.weights), grads),
            "the expression": partial(expression, grads, axes),
            **peers(grads, model.weights),
        }
        found = gpu.end_to_end(candidates)
        mine = found.pop("gcx")
        for name, seconds in found.items():
            what = f"{model.title}, {dtype}: {name} over the hooks of gcx.torch"
            yield Measured(what, seconds / mine, _FASTER, "times", at_least=True)


def _centralize(model: Model, grads: list[Tensor]) -> Any:
    layouts = [weight.layout for weight in model.weights]
    return gcx.centralize_many(grads, layouts=layouts, out=grads)
