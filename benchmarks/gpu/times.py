"""Times beside a copy in the same run, and beside other implementations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.device import COPY, Gpu, centralize
from benchmarks.gpu.report import Measured, NotRunError
from benchmarks.throughput.models import DTYPES, MODELS, output_first
from benchmarks.throughput.on_torch import expression, gradients, peers
from benchmarks.throughput.timing import Call, interleaved
from benchmarks.throughput.workload import GCX, load

__all__ = ["against_loops", "of_cupy", "of_models"]

_OF_A_COPY, _MORE = 1.10, 4e-6
_OF_THE_LOOP = 1 / 8
_MODELS = (
    MODELS["vit-b16"],
    MODELS["gpt2"],
    output_first(MODELS["gpt2"]),
    MODELS["gpt2-xl"],
    output_first(MODELS["gpt2-xl"]),
)
_BRIEF = 3  # of them


def of_models(gpu: Gpu) -> Iterator[Measured]:
    """All gradients of a model, in place."""
    for model in _MODELS[: _BRIEF if gpu.is_brief else None]:
        for dtype, itemsize in DTYPES.items():
            calls = gpu.rotation(model.weights, dtype, partial(centralize, model.weights))
            found = gpu.times({"gcx": calls})
            del calls
            gpu.release()
            copy = 2 * model.elements * itemsize * found[COPY]
            limit = _OF_A_COPY * copy + _MORE
            what = f"{model.title}, {dtype} (a copy: {1e6 * copy:.4g} us)"
            yield Measured(what, 1e6 * found["gcx"], 1e6 * limit, "us")


def of_cupy(gpu: Gpu) -> Iterator[Measured]:
    """Time the gradients of a model, by CuPy's own clock and copy."""
    for model in (MODELS["vit-b16"], MODELS["gpt2"]):
        for dtype in DTYPES:
            workload = load("cupy").workload(model.weights, dtype, gpu.device)
            calls = {name: workload.calls[name] for name in (COPY, GCX)}
            found = interleaved(calls, seconds=0, rounds=20, clock=workload.clock)
            limit = _OF_A_COPY * found[COPY] + _MORE
            what = f"{model.title}, {dtype} (a copy: {1e6 * found[COPY]:.4g} us)"
            yield Measured(what, 1e6 * found[GCX], 1e6 * limit, "us")


def against_loops(gpu: Gpu) -> Iterator[Measured]:
    """Time the gradients of ResNet-50 end to end, beside loops and pytorch_optimizer."""
    model = MODELS["resnet50"]
    others = peers([], model.weights)
    for dtype in DTYPES:
        grads = gradients(model.weights, dtype, gpu.device)
        axes = [weight.axes for weight in model.weights]
        loop = "the loop"
        candidates: dict[str, Call] = {
            "gcx": partial(centralize, model.weights, grads),
            loop: partial(expression, grads, axes),
            **peers(grads, model.weights),
        }
        found = gpu.end_to_end(candidates)
        mine = found.pop("gcx")
        for name, seconds in found.items():
            limit = _OF_THE_LOOP if name == loop else None
            yield Measured(f"{model.title}, {dtype}: gcx over {name}", mine / seconds, limit)
    if not others:
        raise NotRunError("not installed: pytorch_optimizer")
