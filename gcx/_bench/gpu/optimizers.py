"""AdamW and SGD that centralize in their step, against those of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import gcx.torch
from gcx._bench.gpu.device import Gpu
from gcx._bench.gpu.report import Measured
from gcx._bench.models import MODELS, Model, Weight, llama3, output_first
from gcx._bench.timing import Call, interleaved
from gcx._check.formats import FORMATS

__all__ = ["distances", "module_of", "times"]

_STEPS, _ULP = 100, 2.0
_SAMPLES = 10


class _Pair(NamedTuple):
    """An optimizer of gcx, made from a model, and that of torch, made from parameters."""

    of_gcx: Callable[[nn.Module], Optimizer]
    of_torch: Callable[[Any], Optimizer]


_ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}
_SGD: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}

_OPTIMIZERS = {
    "AdamW": _Pair(
        partial(gcx.torch.AdamW, **_ADAMW), partial(torch.optim.AdamW, fused=True, **_ADAMW)
    ),
    "SGD": _Pair(partial(gcx.torch.SGD, **_SGD), partial(torch.optim.SGD, fused=True, **_SGD)),
}

# Fan-ins that a tile holds, in float32; and what is allowed to take a little longer.
_TIMED = (
    (MODELS["resnet50"], "float32", 1.05),
    (MODELS["vit-b16"], "float32", 1.05),
    (output_first(MODELS["gpt2"]), "float32", 1.05),
    (MODELS["vit-b16"], "bfloat16", 1.08),
    (llama3("A block of Llama-3-8B", blocks=1, has_embedding=False), "float32", 1.08),
    (llama3("A block of Llama-3-8B", blocks=1, has_embedding=False), "bfloat16", 1.08),
)
_BRIEF = 2  # of them


def times(gpu: Gpu) -> Iterator[Measured]:
    """Time on the GPU of a step with GC, over that of torch's fused step without."""
    for name, pair in _OPTIMIZERS.items():
        for model, dtype, limit in _TIMED[: _BRIEF if gpu.is_brief else None]:
            module = module_of(model, dtype, gpu.device)
            _draw_gradients(module)
            mine, theirs = pair.of_gcx(module), pair.of_torch(module.parameters())
            steps: dict[str, Call] = {"gcx": mine.step, "torch": theirs.step}
            found = interleaved(
                steps, seconds=0, rounds=_SAMPLES, clock=lambda step, _: gpu.profile(step).seconds
            )
            what = f"{name}, {model.title}, {dtype}: gcx over torch without GC"
            yield Measured(what, found["gcx"] / found["torch"], limit)
            del module, mine, theirs, steps
            gpu.release()


def distances(gpu: Gpu) -> Iterator[Measured]:
    """Compare with torch's fused step on centralized gradients, after many steps.

    In float32: a narrower gradient is rounded before that step, and not on the way in ours.
    """
    for name, pair in _OPTIMIZERS.items():
        modules = [module_of(_small(), "float32", gpu.device) for _ in range(2)]
        optimizers = [pair.of_gcx(modules[0]), pair.of_torch(modules[1].parameters())]
        gcx.torch.centralize(optimizers[1], modules[1])
        for step in range(_STEPS):
            for module, optimizer in zip(modules, optimizers, strict=True):
                _draw_gradients(module, seed=step)
                optimizer.step()
        what = f"{name}, float32: parameters after {_STEPS} steps"
        yield Measured(what, _distance(modules), _ULP, "ulp")


def module_of(model: Model, dtype: str, device: str) -> nn.Module:
    """Give a module with weights of these shapes, and norms for the other parameters."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    layers = [_layer(weight, options) for weight in model.weights]
    norms = [nn.LayerNorm(shape, bias=False, **options) for shape in model.others]
    return nn.Sequential(*layers, *norms)


def _layer(weight: Weight, options: dict[str, Any]) -> nn.Module:
    if len(weight.shape) == 2:
        outputs, inputs = weight.shape
        return nn.Linear(inputs, outputs, bias=False, **options)
    outputs, inputs, height, width = weight.shape
    return nn.Conv2d(inputs, outputs, (height, width), bias=False, **options)


def _small() -> Model:
    """Rows of many lengths, a long one among them."""
    weights = (*MODELS["resnet50"].weights[:10], Weight((16, 14_336)), Weight((30, 2048)))
    return Model("small", weights, ((64,), (1000,)))


def _draw_gradients(module: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)


def _distance(modules: Sequence[nn.Module]) -> float:
    """Largest distance of two parameters, in ulp of the largest one of the output unit."""
    (kind,) = (kind for kind in FORMATS if kind.name == "float32")
    worst = 0.0
    for pair in zip(*(module.parameters() for module in modules), strict=True):
        a, b = (parameter.detach().cpu().double().numpy() for parameter in pair)
        fan_in = tuple(range(1, a.ndim)) or (0,)  # a vector counts as one unit
        ulp = kind.ulp(np.max(np.maximum(np.abs(a), np.abs(b)), axis=fan_in, keepdims=True))
        worst = max(worst, float(np.max(np.abs(a - b) / ulp)))
    return worst
