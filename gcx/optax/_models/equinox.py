"""Equinox models: trees in which the innermost module around a leaf is its layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from jax.tree_util import tree_leaves_with_path

from gcx._decisions import merge
from gcx._rules import BIAS, EMBEDDING, LENGTH, NORM, SLOPE, Rule, Rules
from gcx.optax._models._parameters import Answers, LayerAnswer, SingleLayer, decide_in_stack
from gcx.optax._names import name_of
from gcx.plan import LeaveAlone, PlanRow


def params(model: Any) -> Any:
    """Return a model with None for all that is no array, as ``equinox.filter`` does."""
    return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "shape") else None, model)


def decide(rules: Rules[LayerAnswer], model: Any, *_: Any) -> dict[str, PlanRow]:
    """Decide on each array of a tree of Equinox modules, by its name in ``equinox.filter``."""
    import equinox as eqx

    def is_shared(node: object) -> bool:
        return isinstance(node, eqx.nn.Shared)

    decided = [*_decide_each(rules, model)]
    names = {id(leaf): row.name for leaf, row in decided}
    rows = {row.name: [row] for _, row in decided}
    for shared in filter(is_shared, jax.tree.leaves(model, is_leaf=is_shared)):
        # The call puts the shared array back into every layer that uses it.
        for leaf, row in _decide_each(rules, shared()):
            if id(leaf) in names:
                rows[names[id(leaf)]].insert(-1, row)
    return {name: merge(of_one) for name, of_one in rows.items()}


def _decide_each(
    rules: Rules[LayerAnswer], layer: Any, place: tuple[Any, ...] = ()
) -> Iterator[tuple[Any, PlanRow]]:
    """Yield each array in a layer, and in the modules inside it, with its row."""
    import equinox as eqx

    def is_inside(node: object) -> bool:
        return node is not layer and isinstance(node, eqx.Module)

    for path, node in tree_leaves_with_path(layer, is_leaf=is_inside):
        whole = place + path
        if is_inside(node):
            yield from _decide_each(rules, node, whole)
        elif hasattr(node, "shape"):
            answer, rule = rules.answer(layer, name_of(path))
            yield node, decide_in_stack(name_of(whole), node.shape, answer, rule)


def _linear(layer: Any) -> Answers:
    sizes = (layer.out_features, layer.in_features)
    shape = tuple(1 if size == "scalar" else size for size in sizes)
    return {"weight": SingleLayer("oi", shape), "bias": BIAS}


def _convolution(layer: Any) -> Answers:
    # Transposed convolutions have (out, in / groups, kernel...) too, unlike in torch.
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return {"weight": SingleLayer("o...", shape, in_groups=layer.groups > 1), "bias": BIAS}


def _recurrent(gates: int) -> Rule[LayerAnswer]:
    weight = partial(SingleLayer, "oi", all_gates=True)
    return lambda layer: {
        "weight_ih": weight((gates * layer.hidden_size, layer.input_size)),
        "weight_hh": weight((gates * layer.hidden_size, layer.hidden_size)),
        "bias*": BIAS,
    }


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
    "equinox.nn.*Norm": {"weight": NORM, "bias": BIAS},
}
