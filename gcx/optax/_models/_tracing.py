"""Trace a model on shapes, and note which layer makes which parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from gcx._names import naming
from gcx.optax._models._decision import Decision, KernelAnswer, Shape, settle
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone


class Seen(NamedTuple):
    """A parameter in the call of its layer.

    Attributes
    ----------
    answer, rule
        Answer and name of the layer's rule.
    shape : tuple of int
        Shape for the layer itself, inside ``scan``, ``vmap`` or ``layer_stack``.
    """

    answer: KernelAnswer
    rule: str
    shape: Shape


def join(earlier: Mapping[str, Seen], later: Mapping[str, Seen]) -> dict[str, Seen]:
    """Join the parameters of two calls; one on which they differ is unknown.

    They differ if a layer runs the ``init`` of another model, since names start anew at its root.
    """
    both = {name: _agree(earlier[name], later[name]) for name in earlier.keys() & later.keys()}
    return {**earlier, **later, **both}


def _agree(first: Seen, second: Seen) -> Seen:
    if first == second:
        return first
    reason = f"unknown: two layers have this name, a {first.rule} and a {second.rule}"
    return second._replace(answer=LeaveAlone(reason))


def decide_all(seen: Mapping[str, Seen], shapes: Any) -> dict[str, Decision]:
    """Decide on each parameter of a model with these shapes, by the calls of its layers."""
    return {name: _decision(name, seen.get(name), leaf) for name, leaf in named_leaves(shapes)}


def _decision(name: str, seen: Seen | None, leaf: Any) -> Decision:
    if seen is None:
        return Decision(None, "unknown: it belongs to no module")
    with naming(name):
        return settle(seen.answer, seen.rule, leaf.shape, seen.shape)


def trace_shapes(function: Callable[..., Any], inputs: Any, keyword_inputs: Any) -> Any:
    """Trace ``function(*inputs, **keyword_inputs)``, and return the shapes of its results.

    Arrays and `jax.ShapeDtypeStruct` are traced; other arguments, such as ``train=True``, stay as
    they are.
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
