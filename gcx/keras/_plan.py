"""What happens to each variable of a model, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras

from gcx._decisions import decide as decide_row
from gcx._decisions import find_overrides, merge
from gcx._rules import Answer
from gcx.keras._layers import RULES
from gcx.plan import Plan, PlanRow

# By path of the variable or glob; None and LeaveAlone leave alone.
Overrides = Mapping[str, Answer]


def plan(model: Any, *, overrides: Overrides | None = None) -> Plan:
    """Show what would be centralized in a model, over which axes, and what is left alone and why.

    Parameters
    ----------
    model : keras.Model or keras.Layer
        Any model that is built. Its variables are judged by the layer that owns them, never by
        their rank; a layer that nobody declared is left alone, and says so.
    overrides : mapping from str to Layout, str, LeaveAlone or None, optional
        Answers that come before those of the layers, by the path of a variable
        (``"sequential/dense/kernel"``) or a glob (``"*/head/*"``); the first key that matches
        counts, and None or `gcx.plan.LeaveAlone` leaves alone. For layers of your own,
        `register_layer` says it once.

    Returns
    -------
    gcx.plan.Plan
        One row per trainable variable.

    Raises
    ------
    TypeError
        If `model` is not a layer, or `overrides` holds something else.
    ValueError
        If the model is not built, a key of `overrides` matches no variable, or a layout does not
        fit the rank of its variable.

    Examples
    --------
    >>> import keras
    >>> import gcx.keras
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8, 8, 1)),
    ...         keras.layers.SeparableConv2D(4, 3, name="conv"),
    ...         keras.layers.Flatten(),
    ...         keras.layers.Dense(10, name="head"),
    ...     ],
    ...     name="net",
    ... )
    >>> print(gcx.keras.plan(model))
    parameter                  shape    layout  reason
    net/conv/depthwise_kernel  3x3x1x1  ...oo   SeparableConv2D
    net/conv/pointwise_kernel  1x1x1x4  -       fan-in 1: subtracting its mean would freeze it
    net/conv/bias              4        -       bias
    net/head/kernel            144x10   ...o    Dense
    net/head/bias              10       -       bias
    2 of 5 parameters centralized
    """
    decided = decide(model, overrides)
    return Plan(decided[id(variable)] for variable in model.trainable_variables)


def decide(model: Any, overrides: Overrides | None = None) -> dict[int, PlanRow]:
    """Settle what happens to each variable of a model, by its `id`."""
    if not isinstance(model, keras.Layer):
        msg = f"model is a keras.Model or a keras.Layer, not a {type(model).__name__}"
        raise TypeError(msg)
    if not model.built:
        msg = (
            f"{model.name} has no variables yet: build it first, by keras.Input as its first "
            "layer, model.build(input_shape), or a call on some data"
        )
        raise ValueError(msg)
    owned = list(_owned_variables(model))
    given = find_overrides(overrides or {}, [variable.path for _, variable in owned])
    decided: dict[int, PlanRow] = {}
    for layer, variable in owned:
        answer = RULES.answer(layer, variable.name)
        if variable.path in given:
            answer = given[variable.path], "override"
        new = decide_row(variable.path, tuple(variable.shape), *answer)
        earlier = decided.get(id(variable))
        decided[id(variable)] = new if earlier is None else merge(earlier, new)
    return decided


def _owned_variables(layer: Any, seen: set[int] | None = None) -> Iterator[tuple[Any, Any]]:
    """List the layers below and their own variables, tied ones with each of their layers."""
    seen = set() if seen is None else seen
    if id(layer) in seen:
        return
    seen.add(id(layer))
    # Not `layer.variables`, which has those of the sublayers too, and does not say whose they are.
    own = vars(layer)
    for variable in own["_trainable_variables"]:
        yield layer, variable
    for sublayer in own["_layers"]:
        yield from _owned_variables(sublayer, seen)
