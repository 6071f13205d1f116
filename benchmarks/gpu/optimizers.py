"""AdamW and SGD that centralize in their step, against torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import gcx.torch
from benchmarks.agreement.formats import FORMATS
from benchmarks.gpu.device import Gpu
from benchmarks.gpu.report import Measured, NotRunError
from benchmarks.throughput.models import MODELS, Model, Weight, llama3, output_first
from benchmarks.throughput.on_torch import expression, load_centralize_gradient
from benchmarks.throughput.timing import Call
from gcx.__main__ import attempt
from gcx.torch._plan import Overrides

__all__ = ["against_peers", "distances", "layouts_of", "module_of", "times"]

_STEPS, _ULP = 100, 2.0


class _Pair(NamedTuple):
    """Makers of an optimizer: in gcx, from a model and overrides; in torch, from parameters."""

    of_gcx: Callable[..., Optimizer]
    of_torch: Callable[[Any], Optimizer]


_ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}
_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's defaults
_SGD: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}

_OPTIMIZERS = {
    "AdamW": _Pair(
        partial(gcx.torch.AdamW, **_ADAMW), partial(torch.optim.AdamW, fused=True, **_ADAMW)
    ),
    "SGD": _Pair(partial(gcx.torch.SGD, **_SGD), partial(torch.optim.SGD, fused=True, **_SGD)),
}

_MODELS = (
    MODELS["resnet50"],
    MODELS["vit-b16"],
    output_first(MODELS["gpt2"]),
    MODELS["gpt2"],
    llama3("A block of Llama-3-8B", blocks=1, has_embedding=False),
)
_OF_TORCH = {"float32": 1.05, "bfloat16": 1.08}
_BRIEF = 2  # of the models


def times(gpu: Gpu) -> Iterator[Measured]:
    """Time steps with GC on the GPU, and torch's fused steps without."""
    for name, pair in _OPTIMIZERS.items():
        for model in _MODELS[: _BRIEF if gpu.is_brief else None]:
            for dtype, limit in _OF_TORCH.items():
                module = module_of(model, dtype, gpu.device)
                mine = _make(pair, module)
                theirs = pair.of_torch(module.parameters())
                found = gpu.step_times({"gcx": mine.step, "torch": theirs.step})
                what = f"{name}, {model.title}, {dtype}: gcx over torch without GC"
                yield Measured(what, found["gcx"] / found["torch"], limit)
                del module, mine, theirs
                gpu.release()


def against_peers(gpu: Gpu) -> Iterator[Measured]:
    """Time AdamW with GC on the GPU, and other ways to have both, in float32."""
    for model in _MODELS[:1]:  # torch.compile takes long
        modules = [module_of(model, "float32", gpu.device) for _ in range(1 + len(_PEERS))]
        mine = _make(_OPTIMIZERS["AdamW"], modules[0])
        steps: dict[str, Call] = {"gcx": mine.step}
        lacking: list[str] = []
        for module, (name, join) in zip(modules[1:], _PEERS.items(), strict=True):
            step, error = attempt(partial(join, module, model))
            if step:
                steps[name] = step
            else:
                lacking.append(f"{name}: {error}")
        found = gpu.step_times(steps)
        for name in [*steps][1:]:
            what = f"AdamW, {model.title}, float32: gcx over {name}"
            yield Measured(what, found["gcx"] / found[name], None)
    if lacking:
        raise NotRunError("; ".join(lacking))


def _join(
    load: Callable[[Sequence[Any]], Callable[[list[Any]], object]],
    module: nn.Module,
    model: Model,
) -> Call:
    """Join GC and torch's fused AdamW to one step, and take it once."""
    centralize = load([weight.axes for weight in model.weights])
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, **_ADAMW)
    parameters = [*module.parameters()][: len(model.weights)]

    def step() -> None:
        with torch.no_grad():
            centralize([parameter.grad for parameter in parameters])
        optimizer.step()

    step()
    return step


def _compile(module: nn.Module, model: Model) -> Call:
    """Compile GC and AdamW to one program, which `Optimizer.step` cannot be, and take a step."""
    axes = [weight.axes for weight in model.weights]
    grads: list[Any] = [parameter.grad for parameter in module.parameters()]
    parameters = [parameter.detach() for parameter in module.parameters()]
    firsts, seconds = ([*map(torch.zeros_like, parameters)] for _ in range(2))
    count = torch.zeros((), device=parameters[0].device)
    (beta, other_beta), eps = _BETAS, _EPS

    def step() -> None:
        expression(grads[: len(axes)], axes)
        count.add_(1)
        torch._foreach_mul_(parameters, 1 - _ADAMW["lr"] * _ADAMW["weight_decay"])
        torch._foreach_lerp_(firsts, grads, 1 - beta)
        torch._foreach_mul_(seconds, other_beta)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - other_beta)
        roots = [second.sqrt() for second in seconds]
        torch._foreach_div_(roots, (1 - other_beta**count).sqrt())
        torch._foreach_add_(roots, eps)
        updates = [first / root for first, root in zip(firsts, roots, strict=True)]
        torch._foreach_mul_(updates, _ADAMW["lr"] / (1 - beta**count))
        torch._foreach_sub_(parameters, updates)

    call: Call = torch.compile(step, fullgraph=True)
    call()
    return call


_PEERS: dict[str, Callable[[nn.Module, Model], Call]] = {
    "GC and AdamW in torch.compile": _compile,
    "the loop, then torch": partial(_join, lambda axes: partial(expression, axes=axes)),
    "pytorch_optimizer, then torch": partial(_join, lambda _: load_centralize_gradient()),
}


def distances(gpu: Gpu) -> Iterator[Measured]:
    """Compare with torch's fused step on centralized gradients, after many steps.

    In float32, since torch's step would get a narrower gradient rounded, and ours does not.
    """
    for name, pair in _OPTIMIZERS.items():
        model = _small()
        modules = [module_of(model, "float32", gpu.device) for _ in range(2)]
        mine = _make(pair, modules[0])
        theirs = pair.of_torch(modules[1].parameters())
        gcx.torch.centralize(theirs, modules[1], overrides=layouts_of(modules[1]))
        for step in range(_STEPS):
            for module, optimizer in ((modules[0], mine), (modules[1], theirs)):
                _draw_gradients(module, seed=step)
                optimizer.step()
        what = f"{name}, float32: parameters after {_STEPS} steps"
        yield Measured(what, _distance(model, modules), _ULP, "ulp")


def module_of(model: Model, dtype: str, device: str) -> nn.Module:
    """Make a module with weights of these shapes, norms for the other parameters, and gradients."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    layers = [_layer(weight, options) for weight in model.weights]
    norms = [nn.LayerNorm(shape, bias=False, **options) for shape in model.others]
    module = nn.Sequential(*layers, *norms)
    _draw_gradients(module)
    return module


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


def _make(pair: _Pair, module: nn.Module) -> Optimizer:
    """Make gcx's optimizer; an error if its kernels would not step."""
    optimizer = pair.of_gcx(module, overrides=layouts_of(module))
    reasons = [*filter(None, cast("Any", optimizer).fallbacks)]
    if reasons:
        raise RuntimeError(f"torch makes the step: {reasons[0]}")
    return optimizer


def _draw_gradients(module: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)


def _distance(model: Model, modules: Sequence[nn.Module]) -> float:
    """Find the largest distance of two parameters, in ulp of the largest in their output unit.

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
