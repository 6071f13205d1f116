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
_IN_GROUPS, _ALL_GATES = SIDE_BY_SIDE = (" in groups", ", all gates")


class SingleLayer(NamedTuple):
    """Answer of a rule that knows more of a weight; its shape tells the axes of a stack."""

    layout: str
    shape: Shape | None = None
    in_groups: bool = False
    all_gates: bool = False


LayerAnswer = Answer | SingleLayer
Answers = Mapping[str, LayerAnswer]


def decide_in_stack(
    name: str, shape: Shape, answer: LayerAnswer, rule: str, own_shape: Shape | None = None
) -> PlanRow:
    """Make the row of a parameter; its layer, which may be in a stack, sees `own_shape`."""
    if isinstance(answer, SingleLayer):
        own_shape = answer.shape or own_shape
        rule += _IN_GROUPS * answer.in_groups + _ALL_GATES * answer.all_gates
        answer = answer.layout
    if isinstance(answer, LeaveAlone) and answer.reason.startswith("unknown"):
        answer = LeaveAlone(no_fan_in(shape if own_shape is None else own_shape) or answer.reason)
    if isinstance(answer, (Layout, str)):
        misfit = LeaveAlone(f"unknown: the shape is {shape}, but a {rule} has {own_shape}")
        answer = _with_stack(as_layout(answer), shape, own_shape) or misfit
    return decide_row(name, shape, answer, rule)


def _with_stack(layout: Layout, shape: Shape, own_shape: Shape | None) -> Layout | None:
    """Add the axes that the layer itself does not have; None if no place for them fits."""
    if layout.is_split or shape == own_shape:
        return layout
    if own_shape is None:  # in front, where `vmap` and `scan` put them
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

# Gets the context of a call, and returns a function, or None to pass over the call. After the call
# the function gets the parameters seen inside, and adds the module's own.
Enter = Callable[[Any], Callable[[dict[str, Seen]], None] | None]


def decide_by_calls(
    intercept: Any, enter: Enter, init: Callable[..., Any], inputs: Any, keyword_inputs: Any
) -> dict[str, PlanRow]:
    """Decide on each parameter that `init` makes, by the calls of the layers inside."""
    calls: list[dict[str, Seen]] = [{}]  # of the active calls, the innermost last

    def watch(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        leave = enter(context)
        if leave is None:
            return method(*args, **kwargs)
        calls.append({})
        output = method(*args, **kwargs)
        seen = calls.pop()
        leave(seen)
        calls[-1] = _join(calls[-1], seen)
        return output

    with intercept(watch):
        shapes = trace_shapes(init, inputs, keyword_inputs)
    return {
        name: decide_in_stack(name, leaf.shape, *calls[0].get(name, _UNSEEN))
        for name, leaf in named_leaves(shapes)
    }


def _join(earlier: Mapping[str, Seen], later: Mapping[str, Seen]) -> dict[str, Seen]:
    """Join the parameters of two calls; where they differ, a parameter is unknown."""
    joined = {**earlier, **later}
    # A layer that runs the ``init`` of another model starts its names anew.
    for name in earlier.keys() & later.keys():
        first, second = earlier[name], later[name]
        if first != second:
            reason = f"unknown: two layers have this name, a {first.rule} and a {second.rule}"
            joined[name] = second._replace(answer=LeaveAlone(reason))
    return joined


def trace_shapes(function: Callable[..., Any], inputs: Any, keyword_inputs: Any) -> Any:
    """Trace a function on its arrays, but not on other arguments (``train=True``)."""
    leaves, structure = jax.tree.flatten((inputs, keyword_inputs))
    arrays = {k: x for k, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def of_arrays(traced: Mapping[int, Any]) -> Any:
        mixed = [traced.get(k, leaf) for k, leaf in enumerate(leaves)]
        inputs, keyword_inputs = jax.tree.unflatten(structure, mixed)
        return function(*inputs, **keyword_inputs)

    try:
        return jax.eval_shape(of_arrays, arrays)
    except Exception as error:
        if not arrays:
            error.add_note("no example input is an array or jax.ShapeDtypeStruct(shape, dtype)")
        raise
