"""Run a model on shapes alone, and note which layer makes which parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from gcx._names import naming
from gcx.optax._models._decision import Decision, KernelAnswer, Shape, settle
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone


class Seen(NamedTuple):
    """What a layer said of a parameter when it was called.

    Attributes
    ----------
    answer, rule
        Of its rule.
    shape : tuple of int
        As the layer itself sees it, within ``scan``, ``vmap`` or ``layer_stack``.
    """

    answer: KernelAnswer
    rule: str
    shape: Shape


def joined(earlier: Mapping[str, Seen], later: Mapping[str, Seen]) -> dict[str, Seen]:
    """Put together what two calls have shown; nothing is believed of which they differ.

    They do where a layer runs the ``init`` of another model, whose names begin at its own root and
    may be those of this one.
    """
    both = {name: _agreed(earlier[name], later[name]) for name in earlier.keys() & later.keys()}
    return {**earlier, **later, **both}


def _agreed(first: Seen, second: Seen) -> Seen:
    if first == second:
        return first
    reason = f"unknown: two layers have this name, a {first.rule} and a {second.rule}"
    return second._replace(answer=LeaveAlone(reason))


def decisions(seen: Mapping[str, Seen], shapes: Any) -> dict[str, Decision]:
    """Decide on each parameter of a model, of these shapes, by what its calls have shown."""
    return {name: _decision(name, seen.get(name), leaf) for name, leaf in named_leaves(shapes)}


def _decision(name: str, seen: Seen | None, leaf: Any) -> Decision:
    if seen is None:
        return Decision(None, "unknown: it belongs to no module")
    with naming(name):
        return settle(seen.answer, seen.rule, leaf.shape, seen.shape)


def shapes_of(function: Callable[..., Any], inputs: Any, keyword_inputs: Any) -> Any:
    """Shapes of what ``function(*inputs, **keyword_inputs)`` returns, with nothing computed.

    Arrays and `jax.ShapeDtypeStruct` are traced; everything else, such as ``train=True``, is passed
    as it is.
    """
    leaves, structure = jax.tree.flatten((inputs, keyword_inputs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def of_arrays(*arrays: Any) -> Any:
        traced = iter(arrays)
        mixed = [next(traced) if k else leaf for k, leaf in zip(is_array, leaves, strict=True)]
        inputs, keyword_inputs = jax.tree.unflatten(structure, mixed)
        return function(*inputs, **keyword_inputs)

    arrays = [leaf for k, leaf in zip(is_array, leaves, strict=True) if k]
    return jax.eval_shape(of_arrays, *arrays)
