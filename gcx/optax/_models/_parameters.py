"""Parameters of layers: their rows in the plan of a model, also in stacks of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from gcx._decisions import decide
from gcx._rules import Answer
from gcx.layout import Layout, as_layout
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone, PlanRow

Shape = tuple[int, ...]

# Reasons that several frameworks share.
SLOPE = LeaveAlone("slope of an activation")
LENGTH = LeaveAlone("weight norm: the length of a weight")


class SingleLayer(NamedTuple):
    """Answer of a rule that also knows the shape of the weight.

    Attributes
    ----------
    layout : str
        Layout of the weight in a single layer.
    shape : tuple of int
        Shape of the weight in a single layer. It tells the axes of a stack from the others.
    """

    layout: str
    shape: Shape


LayerAnswer = Answer | SingleLayer
Answers = Mapping[str, LayerAnswer]


def decide_in_stack(
    name: str, shape: Shape, answer: LayerAnswer, rule: str, own_shape: Shape | None = None
) -> PlanRow:
    """Make the row of a parameter whose layer may be one of a stack.

    Parameters
    ----------
    name : str
        Name of the parameter.
    shape : tuple of int
        Shape for the optimizer, with the axes of the stack.
    answer : Layout, str, SingleLayer, LeaveAlone or None
        Answer of the layer's rule.
    rule : str
        Name of the rule.
    own_shape : tuple of int, optional
        Shape for the layer itself, if known.
    """
    if isinstance(answer, SingleLayer):
        answer, own_shape = answer
    if isinstance(answer, (Layout, str)):
        answer = _with_stack(as_layout(answer), shape, own_shape, rule)
    return decide(name, shape, answer, rule)


def _with_stack(
    layout: Layout, shape: Shape, own_shape: Shape | None, rule: str
) -> Layout | LeaveAlone:
    if layout.is_split or shape == own_shape:
        return layout
    if own_shape is None:
        return _led_by_stack(layout, len(shape))
    stacked = _around(layout, own_shape, shape)
    unknown = LeaveAlone(f"unknown: the shape is {shape}, but a {rule} has {own_shape}")
    return unknown if stacked is None else stacked


def _led_by_stack(layout: Layout, ndim: int) -> Layout:
    """Keep the surplus axes in front, where `vmap` and `scan` put the axes of a stack.

    >>> _led_by_stack(Layout("io"), 3)
    Layout('bio')
    """
    text = str(layout)
    return layout if "..." in text else Layout("b" * (ndim - len(text)) + text)


def _around(layout: Layout, own_shape: Shape, shape: Shape) -> Layout | None:
    """Keep the axes that the layer itself does not have; None if no place for them fits.

    >>> _around(Layout("...o"), (3, 8, 4), (3, 6, 8, 4))
    Layout('ibio')
    """
    letters = layout.letters(len(own_shape))
    more = len(shape) - len(own_shape)
    for k in range(len(own_shape) + 1 if more > 0 else 0):
        if shape[:k] + shape[k + more :] == own_shape:
            return Layout(letters[:k] + "b" * more + letters[k:])
    return None


class Seen(NamedTuple):
    """A parameter in the call of its layer.

    Attributes
    ----------
    answer, rule
        Answer and name of the layer's rule.
    shape : tuple of int
        Shape for the layer itself, inside ``scan``, ``vmap`` or ``layer_stack``.
    """

    answer: LayerAnswer
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


def decide_all(seen: Mapping[str, Seen], shapes: Any) -> dict[str, PlanRow]:
    """Make the row of each parameter of a model with these shapes, by the calls of its layers."""
    return {name: _decide(name, leaf.shape, seen.get(name)) for name, leaf in named_leaves(shapes)}


def _decide(name: str, shape: Shape, seen: Seen | None) -> PlanRow:
    if seen is None:
        return PlanRow(name, shape, None, "unknown: it belongs to no module")
    return decide_in_stack(name, shape, seen.answer, seen.rule, seen.shape)


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
