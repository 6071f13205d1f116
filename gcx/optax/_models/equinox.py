"""Equinox: a model is a tree, and the modules on the way to a leaf are its layers."""

from __future__ import annotations

from typing import Any

import jax

from gcx._names import naming
from gcx._rules import BIAS, EMBEDDING, NORM, Rule, Rules
from gcx.optax._models._decision import (
    LENGTH,
    SLOPE,
    Answers,
    Decision,
    Kernel,
    KernelAnswer,
    merge,
    settle,
)
from gcx.optax._names import name_of
from gcx.plan import LeaveAlone


def decide(rules: Rules[KernelAnswer], model: Any) -> dict[str, Decision]:
    """Decide on each array of an Equinox module; names are those of ``equinox.filter``."""
    import equinox as eqx

    names: dict[int, str] = {}
    decisions: dict[str, Decision] = {}
    for path, leaf in _arrays(model):
        name = names[id(leaf)] = name_of(path)
        decisions[name] = _of(rules, model, path, leaf)

    def is_shared(node: object) -> bool:
        return isinstance(node, eqx.nn.Shared)

    for shared in filter(is_shared, jax.tree.leaves(model, is_leaf=is_shared)):
        layers = shared()  # with its array in every place where it is used
        found: dict[str, Decision] = {}
        for path, leaf in _arrays(layers):
            if id(leaf) in names:
                name, decision = names[id(leaf)], _of(rules, layers, path, leaf)
                found[name] = merge(found.get(name, decision), decision)
        decisions |= found
    return decisions


def _arrays(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(path, leaf) for path, leaf in leaves if hasattr(leaf, "shape")]


def _of(rules: Rules[KernelAnswer], tree: Any, path: tuple[Any, ...], leaf: Any) -> Decision:
    layer, rest = _owner(tree, path)
    answer, rule = rules.answer(layer, name_of(rest))
    with naming(name_of(path)):
        return settle(answer, rule, leaf.shape, own_shape=None)


def _owner(tree: Any, path: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Find the last module on the way to a leaf, and the rest of the way from there."""
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
            break  # a node of another kind, which does not tell how to get inside
        if isinstance(node, eqx.Module):
            owner, rest = node, path[k + 1 :]
    return owner, rest


def _linear(layer: Any) -> Answers:
    sizes = (layer.out_features, layer.in_features)
    shape = tuple(1 if size == "scalar" else size for size in sizes)
    return {"weight": Kernel("oi", shape), "bias": BIAS}


def _convolution(layer: Any) -> Answers:
    # Unlike those of torch, transposed ones have (out, in / groups, kernel...) too.
    per_group = layer.in_channels // layer.groups
    shape = (layer.out_channels, per_group, *layer.kernel_size)
    return {"weight": Kernel("o...", shape), "bias": BIAS}


def _recurrent(gates: int) -> Rule[KernelAnswer]:
    def rule(layer: Any) -> Answers:
        units = gates * layer.hidden_size
        return {
            "weight_ih": Kernel("oi", (units, layer.input_size)),
            "weight_hh": Kernel("oi", (units, layer.hidden_size)),
            "bias*": BIAS,
        }

    return rule


_NORM: Answers = {"weight": NORM, "bias": BIAS}

RULES: dict[str, Rule[KernelAnswer]] = {
    "equinox.nn.*.Linear": _linear,
    "equinox.nn.*.Conv": _convolution,
    "equinox.nn.*.ConvTranspose": _convolution,
    "equinox.nn.*.GRUCell": _recurrent(gates=3),
    "equinox.nn.*.LSTMCell": _recurrent(gates=4),
    "equinox.nn.*.Embedding": {"weight": EMBEDDING},
    "equinox.nn.*.WeightNorm": {"g": LENGTH},
    "equinox.nn.*.PReLU": {"negative_slope": SLOPE},
    "equinox.nn.*.StateIndex": {"*": LeaveAlone("state of a layer")},
    **dict.fromkeys(
        [f"equinox.nn.*.{kind}Norm" for kind in ("Batch", "Layer", "Group", "RMS")], _NORM
    ),
}
