"""Parameters of layers: their rows in the plan of a model, also in stacks of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from gcx._decisions import decide_row, no_fan_in
from gcx._rules import Answer
from gcx.layout import Layout, as_layout
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone, PlanRow

Shape = tuple[int, ...]

# Ends of the reason for a weight whose outputs belong to several maps, side by side.
IN_GROUPS, ALL_GATES = SIDE_BY_SIDE = (" in groups", ", all gates")

_AN_ARRAY = "an array or jax.ShapeDtypeStruct(shape, dtype)"


class SingleLayer(NamedTuple):
    """Answer of a rule that also knows the shape of the weight in a single layer, or its maps.

    The shape tells the axes of a stack from the others.
    """

    layout: str
    shape: Shape | None = None
    maps: str = ""  # one of SIDE_BY_SIDE, if it holds several


LayerAnswer = Answer | SingleLayer
Answers = Mapping[str, LayerAnswer]


def decide_in_stack(
    name: str, shape: Shape, answer: LayerAnswer, rule: str, own_shape: Shape | None = None
) -> PlanRow:
    """Make the row of a parameter whose layer may be in a stack.

    `shape` has the axes of the stack; the layer itself sees `own_shape`, if that is known.
    """
    if isinstance(answer, SingleLayer):
        own_shape = answer.shape or own_shape
        rule += answer.maps
        answer = answer.layout
    if isinstance(answer, LeaveAlone) and answer.reason.startswith("unknown"):
        own = shape if own_shape is None else own_shape
        answer = LeaveAlone(no_fan_in(own) or answer.reason)
    if isinstance(answer, (Layout, str)):
        misfit = LeaveAlone(f"unknown: the shape is {shape}, but a {rule} has {own_shape}")
        answer = _with_stack(as_layout(answer), shape, own_shape) or misfit
    return decide_row(name, shape, answer, rule)


def _with_stack(layout: Layout, shape: Shape, own_shape: Shape | None) -> Layout | None:
    """Add the axes that the layer itself does not have; None if no place for them fits.

    If its own shape is not known, they are in front, where `vmap` and `scan` put them.

    >>> _with_stack(Layout("...o"), (3, 6, 8, 4), (3, 8, 4))
    Layout('ibio')
    >>> _with_stack(Layout("io"), (6, 8, 4), None)
    Layout('bio')
    """
    if layout.is_split or shape == own_shape:
        return layout
    if own_shape is None:
        text = str(layout)
        return layout if "..." in text else Layout("b" * (len(shape) - len(text)) + text)
    letters = layout.letters(len(own_shape))
    more = len(shape) - len(own_shape)
    for k in range(len(own_shape) + 1 if more > 0 else 0):
        if shape[:k] + shape[k + more :] == own_shape:
            return Layout(letters[:k] + "b" * more + letters[k:])
    return None


class Seen(NamedTuple):
    answer: LayerAnswer
    rule: str
    shape: Shape | None  # for the layer itself, inside ``scan``, ``vmap`` or ``layer_stack``


_UNSEEN = Seen(LeaveAlone("unknown: it belongs to no module"), "", None)


def join(earlier: Mapping[str, Seen], later: Mapping[str, Seen]) -> dict[str, Seen]:
    """Join the parameters of two calls; where they differ, a parameter is unknown.

    A layer that runs the ``init`` of another model starts its names anew.
    """
    joined = {**earlier, **later}
    for name in earlier.keys() & later.keys():
        first, second = earlier[name], later[name]
        if first != second:
            reason = f"unknown: two layers have this name, a {first.rule} and a {second.rule}"
            joined[name] = second._replace(answer=LeaveAlone(reason))
    return joined


def decide_all(seen: Mapping[str, Seen], shapes: Any) -> dict[str, PlanRow]:
    """Make the row of each parameter of a model with these shapes, by the calls of its layers."""
    return {
        name: decide_in_stack(name, leaf.shape, *seen.get(name, _UNSEEN))
        for name, leaf in named_leaves(shapes)
    }


def trace_shapes(function: Callable[..., Any], inputs: Any, keyword_inputs: Any) -> Any:
    """Trace ``function(*inputs, **keyword_inputs)``, and return the shapes of its results.

    Arrays and `jax.ShapeDtypeStruct` are traced; other arguments, such as ``train=True``, stay as
    they are.
    """
    leaves, structure = jax.tree.flatten((inputs, keyword_inputs))
    arrays = [x if hasattr(x, "shape") and hasattr(x, "dtype") else None for x in leaves]
    has_arrays = any(array is not None for array in arrays)
    for given in () if has_arrays else inputs:
        if isinstance(given, (list, tuple)):
            raise TypeError(f"an example input is {_AN_ARRAY}, not {given!r}")

    def of_arrays(traced: list[Any]) -> Any:
        mixed = [x if t is None else t for t, x in zip(traced, leaves, strict=True)]
        inputs, keyword_inputs = jax.tree.unflatten(structure, mixed)
        return function(*inputs, **keyword_inputs)

    try:
        return jax.eval_shape(of_arrays, arrays)
    except Exception as error:
        if not has_arrays:
            error.add_note(f"no example input is {_AN_ARRAY}")
        raise
