"""The forms in which layouts may be given, read into one: a function of name and array."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType
from typing import Any

from gcx._rules import Answer
from gcx.layout import Layout, LayoutLike, as_layout
from gcx.optax._layers._decision import Decision
from gcx.optax._layers._frameworks import decide, framework_of
from gcx.optax._layers._names import Names, keys_by_name
from gcx.optax._layers._presets import PRESETS
from gcx.plan import LeaveAlone

# A preset, a mapping, a function, or a model of a framework that need not be installed.
Layouts = str | Mapping[str, Answer] | Callable[[str, Any], Answer] | object

# Name and array to layout (or None) and the reason for it.
NameRule = Callable[[str, Any], tuple[LayoutLike | None, str]]

# The names there are, to a rule.
Source = Callable[[Names], NameRule]

TOO_FEW_AXES = "rank below 2"

_PRESET_NAMES = ", ".join(map(repr, PRESETS))


def source_of(layouts: Layouts) -> Source:
    """Read any form of `layouts`, once; errors on what is none."""
    if isinstance(layouts, str):
        if layouts not in PRESETS:
            msg = (
                f"layouts: no preset {layouts!r}; there are {_PRESET_NAMES}. "
                "To give every parameter one layout use a mapping: {'*': 'o...'}"
            )
            raise ValueError(msg)
        return _whatever_the_names(partial(_from_preset, layouts))
    # Before the other forms: a model may be callable, or a mapping.
    framework = framework_of(layouts)
    if framework is not None:
        if framework.needs_inputs:
            msg = (
                f"a model of {framework.module} has no layers before it sees an input: give "
                "gcx.optax.layouts(model, *example_inputs), where shapes will do"
            )
            raise TypeError(msg)
        return _whatever_the_names(partial(_from_model, decide(layouts)))
    if isinstance(layouts, type):
        name = layouts.__name__
        msg = f"layouts is the class {name}, which has no shapes: give a model, such as {name}(...)"
        raise TypeError(msg)
    if isinstance(layouts, Mapping):
        _check_answers(layouts)
        return partial(_mapping_rule, layouts)
    if callable(layouts):
        return _whatever_the_names(partial(_from_function, layouts))
    msg = (
        f"layouts is an nnx or Equinox module, a mapping from path to layout or None, a function "
        f"of path and array, or a preset ({_PRESET_NAMES}), not {type(layouts).__name__}"
    )
    raise TypeError(msg)


def _whatever_the_names(rule: NameRule) -> Source:
    return lambda _names: rule


def _from_preset(preset: str, name: str, leaf: Any) -> tuple[LayoutLike | None, str]:
    for pattern, layout, reason in PRESETS[preset]:
        is_named_so = re.search(f"{pattern}$", f"/{name}")
        if is_named_so and (layout is None or _fits(layout, leaf.ndim)):
            return layout, reason
    return None, _no_rule(leaf)


def _from_model(
    decisions: Mapping[str, Decision], name: str, leaf: Any
) -> tuple[LayoutLike | None, str]:
    if name in decisions or leaf.ndim < 2:
        return decisions.get(name, (None, TOO_FEW_AXES))
    return None, "unknown: the model has no parameter of this name"


def _from_function(
    function: Callable[[str, Any], Answer], name: str, leaf: Any
) -> tuple[LayoutLike | None, str]:
    return _as_given(function(name, leaf))


def _check_answers(layouts: Mapping[str, Answer]) -> None:
    for path, answer in layouts.items():
        if not isinstance(answer, (str, Layout, LeaveAlone, NoneType)):
            msg = (
                f"layouts: {path!r} has a {type(answer).__name__}, where a mapping goes from the "
                "path of a parameter to a layout, LeaveAlone or None. Parameters alone do not tell "
                f"their fan-in: give the model, or a preset ({_PRESET_NAMES})"
            )
            raise TypeError(msg)


def _mapping_rule(layouts: Mapping[str, Answer], names: Names) -> NameRule:
    keys = keys_by_name(layouts, names, what="layouts")

    def rule(name: str, leaf: Any) -> tuple[LayoutLike | None, str]:
        return _as_given(layouts[keys[name]]) if name in keys else (None, _no_rule(leaf))

    return rule


def _as_given(answer: Answer) -> tuple[LayoutLike | None, str]:
    return (None, answer.reason) if isinstance(answer, LeaveAlone) else (answer, "as given")


def _no_rule(leaf: Any) -> str:
    return "unknown: no rule for this name" if leaf.ndim > 1 else TOO_FEW_AXES


def _fits(layout: str, ndim: int) -> bool:
    try:
        return bool(as_layout(layout).fan_in_axes(ndim))
    except ValueError:
        return False
