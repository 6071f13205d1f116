"""Equinox models: trees in which the innermost module around a leaf is its layer."""

from __future__ import annotations

from typing import Any

import jax

from gcx._decisions import merge
from gcx._rules import BIAS, EMBEDDING, LENGTH, NORM, SLOPE, Rule, Rules
from gcx.optax._models._parameters import Answers, LayerAnswer, SingleLayer, decide_in_stack
from gcx.optax._names import name_of
from gcx.plan import LeaveAlone, PlanRow


def params(model: Any) -> Any:
    """Return a model with None for all that is no array, as ``equinox.filter`` does."""
    return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "shape") else None, model)


def decide(rules: Rules[LayerAnswer], model: Any) -> dict[str, PlanRow]:
    """Decide on each array of a tree of Equinox modules, by its name in ``equinox.filter``."""
    import equinox as eqx

    names: dict[int, str] = {}
    decisions: dict[str, PlanRow] = {}
    for path, leaf in _arrays(model):
        name = names[id(leaf)] = name_of(path)
        decisions[name] = _of(rules, model, path, leaf)

    def is_shared(node: object) -> bool:
        return isinstance(node, eqx.nn.Shared)

    for shared in filter(is_shared, jax.tree.leaves(model, is_leaf=is_shared)):
        layers = shared()  # puts its array back into every layer that uses it
        found: dict[str, PlanRow] = {}
        for path, leaf in _arrays(layers):
            if id(leaf) in names:
                name, decision = names[id(leaf)], _of(rules, layers, path, leaf)
                found[name] = merge([found.get(name, decision), decision])
        decisions |= found
    return decisions


def _arrays(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, leaf) for path, leaf in leaves if hasattr(leaf, "shape")]


def _of(rules: Rules[LayerAnswer], tree: Any, path: tuple[Any, ...], leaf: Any) -> PlanRow:
    layer, rest = _owner(tree, path)
    answer, rule = rules.answer(layer, name_of(rest))
    return decide_in_stack(name_of(path), leaf.shape, answer, rule)


def _owner(tree: Any, path: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Find the innermost module around a leaf, and the path of the leaf in that module."""
    import equinox as eqx

    owner, rest = tree, path
    node = tree
    for k, key in enumerate(path):
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
        else:
            break  # a custom node, whose keys do not lead to its children
        if isinstance(node, eqx.Module):
            owner, rest = node, path[k + 1 :]
    return owner, rest


def _linear(layer: Any) -> Answers:
    sizes = (layer.out_features, layer.in_features)
    shape = tuple(1 if size == "scalar" else size for size in sizes)
    return {"weight": SingleLayer("oi", shape), "bias": BIAS}


def _convolution(layer: Any) -> Answers:
    # Transposed convolutions have (out, in / groups, kernel...) too, unlike in torch.
    per_group = layer.in_channels // layer.groups
    shape = (layer.out_channels, per_group, *layer.kernel_size)
    return {"weight": SingleLayer("o...", shape, is_grouped=layer.groups > 1), "bias": BIAS}


def _recurrent(gates: int) -> Rule[LayerAnswer]:
    def rule(layer: Any) -> Answers:
        units = gates * layer.hidden_size
        return {
            "weight_ih": SingleLayer("oi", (units, layer.input_size)),
            "weight_hh": SingleLayer("oi", (units, layer.hidden_size)),
            "bias*": BIAS,
        }

    return rule


_NORM: Answers = {"weight": NORM, "bias": BIAS}
_NORMS = ("Batch", "Layer", "Group", "RMS")

RULES: dict[str, Rule[LayerAnswer]] = {
    "equinox.nn.*.Linear": _linear,
    "equinox.nn.*.Conv": _convolution,
    "equinox.nn.*.ConvTranspose": _convolution,
    "equinox.nn.*.GRUCell": _recurrent(gates=3),
    "equinox.nn.*.LSTMCell": _recurrent(gates=4),
    "equinox.nn.*.Embedding": {"weight": EMBEDDING},
    "equinox.nn.*.WeightNorm": {"g": LENGTH},
    "equinox.nn.*.PReLU": {"negative_slope": SLOPE},
    "equinox.nn.*.StateIndex": {"*": LeaveAlone("state of a layer")},
    **dict.fromkeys([f"equinox.nn.*.{kind}Norm" for kind in _NORMS], _NORM),
}
