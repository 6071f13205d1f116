"""Flax nnx models: graphs of modules and their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gcx._decisions import merge
from gcx._rules import BIAS, EMBEDDING, MASKED, NORM, SLOPE, Rule, Rules
from gcx.optax._models._parameters import Answers, LayerAnswer, SingleLayer, decide_in_stack
from gcx.optax._models.linen import einsum_kernel
from gcx.plan import PlanRow


def params(model: Any) -> Any:
    from flax import nnx

    return nnx.state(model, nnx.Param)


def decide(rules: Rules[LayerAnswer], model: Any) -> dict[str, PlanRow]:
    """Decide on each `nnx.Param` in a tree of nnx modules, by its name in ``nnx.state``."""
    from flax import nnx

    nodes = list(nnx.iter_graph(model))
    # Lists and dicts of modules are modules too, but not layers.
    layers = {
        path: node
        for path, node in nodes
        if isinstance(node, nnx.Module) and not isinstance(node, (Sequence, Mapping))
    }

    def of(param: Any, owner: tuple[Any, ...], rest: tuple[Any, ...]) -> PlanRow:
        answer, rule = rules.answer(layers.get(owner, model), _joined(rest))
        return decide_in_stack(_joined((*owner, *rest)), param.shape, answer, rule)

    paths, decisions = {}, {}
    for path, param in nodes:
        if isinstance(param, nnx.Param):
            above = (path[:k] for k in range(len(path), -1, -1))
            owner = next((place for place in above if place in layers), ())
            paths[id(param)] = path
            decisions[path] = of(param, owner, path[len(owner) :])
    for owner, layer in layers.items():
        for key, param in vars(layer).items():
            first = paths.get(id(param))
            if first is not None and first != (*owner, key):  # tied: this layer holds it too
                decisions[first] = merge([decisions[first], of(param, owner, (key,))])
    return {_joined(path): decision for path, decision in decisions.items()}


def _joined(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _linear(layer: Any) -> Answers:
    return {"kernel": SingleLayer("io", (layer.in_features, layer.out_features)), "bias": BIAS}


def _linear_general(layer: Any) -> Answers:
    batch = tuple(layer.batch_axis.values())
    inputs, outputs = layer.in_features, layer.out_features
    layout = "b" * len(batch) + "i" * len(inputs) + "o" * len(outputs)
    return {"kernel": SingleLayer(layout, (*batch, *inputs, *outputs)), "bias": BIAS}


def _einsum(layer: Any) -> Answers:
    found = einsum_kernel(layer.einsum_str)
    if isinstance(found, str):
        found = SingleLayer(found, tuple(layer.kernel_shape))
    return {"kernel": found, "bias": BIAS}


def _convolution(layer: Any) -> Answers:
    layout = "...oi" if getattr(layer, "transpose_kernel", False) else "...o"
    is_grouped = getattr(layer, "feature_group_count", 1) > 1
    kernel = SingleLayer(layout, layer.kernel_shape, is_grouped=is_grouped)
    return {"kernel": kernel if layer.mask is None else MASKED, "bias": BIAS}


_NORM: Answers = {"scale": NORM, "bias": BIAS}
_NORMS = ("Batch", "Layer", "Group", "RMS", "Instance")

RULES: dict[str, Rule[LayerAnswer]] = {
    "flax.nnx.*.Linear": _linear,
    "flax.nnx.*.LinearGeneral": _linear_general,
    "flax.nnx.*.Einsum": _einsum,
    **dict.fromkeys(("flax.nnx.*.Conv", "flax.nnx.*.ConvTranspose"), _convolution),
    "flax.nnx.*.LoRA": {"lora_a": "io", "lora_b": "io"},
    "flax.nnx.*.Embed": {"embedding": EMBEDDING},
    "flax.nnx.*.PReLU": {"negative_slope": SLOPE},
    **dict.fromkeys([f"flax.nnx.*.{kind}Norm" for kind in _NORMS], _NORM),
}
