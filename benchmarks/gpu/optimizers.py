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
from benchmarks.agreement.formats import FORMATS
from benchmarks.gpu.device import Gpu
from benchmarks.gpu.report import Measured
from benchmarks.throughput.models import MODELS, Model, Weight, llama3, output_first
from benchmarks.throughput.timing import Call, interleaved
from gcx.torch._plan import Overrides

__all__ = ["distances", "layouts_of", "module_of", "times"]

_STEPS, _ULP = 100, 2.0
_SAMPLES = 10


class _Pair(NamedTuple):
    """An optimizer of gcx, made from a model and overrides, and that of torch, from parameters."""

    of_gcx: Callable[..., Optimizer]
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
    (MODELS["gpt2"], "float32", 1.05),
    (MODELS["vit-b16"], "bfloat16", 1.08),
    (MODELS["gpt2"], "bfloat16", 1.08),
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
            mine = pair.of_gcx(module, overrides=layouts_of(module))
            theirs = pair.of_torch(module.parameters())
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
        model = _small()
        modules = [module_of(model, "float32", gpu.device) for _ in range(2)]
        mine = pair.of_gcx(modules[0], overrides=layouts_of(modules[0]))
        theirs = pair.of_torch(modules[1].parameters())
        gcx.torch.centralize(theirs, modules[1], overrides=layouts_of(modules[1]))
        for step in range(_STEPS):
            for module, optimizer in ((modules[0], mine), (modules[1], theirs)):
                _draw_gradients(module, seed=step)
                optimizer.step()
        what = f"{name}, float32: parameters after {_STEPS} steps"
        yield Measured(what, _distance(model, modules), _ULP, "ulp")


def module_of(model: Model, dtype: str, device: str) -> nn.Module:
    """Give a module with weights of these shapes, and norms for the other parameters."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    layers = [_layer(weight, options) for weight in model.weights]
    norms = [nn.LayerNorm(shape, bias=False, **options) for shape in model.others]
    return nn.Sequential(*layers, *norms)


def layouts_of(module: nn.Module) -> Overrides:
    """Tell where the fan-in is, for layers of which `gcx.torch` cannot know it."""
    return {
        layer: _InputFirst.layout for layer in module.children() if isinstance(layer, _InputFirst)
    }


class _InputFirst(nn.Module):
    """Holds the weight of a linear layer as (in, out)."""

    layout = "...o"

    def __init__(self, inputs: int, outputs: int, options: dict[str, Any]) -> None:
        super().__init__()
        weight = nn.Linear(inputs, outputs, bias=False, **options).weight.detach()
        self.weight = nn.Parameter(weight.T.contiguous())


def _layer(weight: Weight, options: dict[str, Any]) -> nn.Module:
    if weight.layout == _InputFirst.layout:
        inputs, outputs = weight.shape
        return _InputFirst(inputs, outputs, options)
    if len(weight.shape) == 2:
        outputs, inputs = weight.shape
        return nn.Linear(inputs, outputs, bias=False, **options)
    outputs, inputs, height, width = weight.shape
    return nn.Conv2d(inputs, outputs, (height, width), bias=False, **options)


def _small() -> Model:
    """Rows of many lengths, a long one among them, and columns."""
    rows = (*MODELS["resnet50"].weights[:10], Weight((16, 14_336)), Weight((30, 2048)))
    columns = (Weight((48, 144), "...o"), Weight((3072, 40), "...o"))
    return Model("small", (*rows, *columns), ((64,), (1000,)))


def _draw_gradients(module: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)


def _distance(model: Model, modules: Sequence[nn.Module]) -> float:
    """Largest distance of two parameters, in ulp of the largest one of the output unit.

    The parameters that are no weights count as one unit each.
    """
    (kind,) = (kind for kind in FORMATS if kind.name == "float32")
    of_weights = [weight.axes for weight in model.weights]
    of_others = [tuple(range(len(shape))) for shape in model.others]
    worst = 0.0
    parameters = (module.parameters() for module in modules)
    for fan_in, *pair in zip((*of_weights, *of_others), *parameters, strict=True):
        a, b = (parameter.detach().cpu().double().numpy() for parameter in pair)
        ulp = kind.ulp(np.max(np.maximum(np.abs(a), np.abs(b)), axis=fan_in, keepdims=True))
        worst = max(worst, float(np.max(np.abs(a - b) / ulp)))
    return worst
