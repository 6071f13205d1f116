"""The forms in which layouts may be given, read into one: a function of name and array."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from gcx._globs import first_keys
from gcx._rules import Answer
from gcx.layout import LayoutLike, as_layout
from gcx.optax._layers._decision import Decision
from gcx.optax._layers._frameworks import decide, framework_of
from gcx.optax._layers._presets import PRESETS
from gcx.plan import LeaveAlone

# A preset, a mapping, a function, or a model of a framework that need not be installed.
Layouts = str | Mapping[str, Answer] | Callable[[str, Any], Answer] | object

# Name and array to layout (or None) and the reason for it.
NameRule = Callable[[str, Any], tuple[LayoutLike | None, str]]

# The names there are, and whether those are all, to a rule.
Source = Callable[[list[str], bool], NameRule]

TOO_FEW_AXES = "rank below 2"


def source_of(layouts: Layouts) -> Source:
    """Read any form of `layouts`, once; errors on what is none."""
    presets = ", ".join(map(repr, PRESETS))
    if isinstance(layouts, str):
        if layouts not in PRESETS:
            msg = (
                f"layouts: no preset {layouts!r}; there are {presets}. "
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
    if isinstance(layouts, Mapping):
        return partial(_mapping_rule, layouts)
    if callable(layouts):
        return _whatever_the_names(partial(_from_function, layouts))
    msg = (
        f"layouts is an nnx or Equinox module, a mapping from path to layout or None, a function "
        f"of path and array, or a preset ({presets}), not {type(layouts).__name__}"
    )
    raise TypeError(msg)


def _whatever_the_names(rule: NameRule) -> Source:
    return lambda _names, _complete: rule


def _from_preset(preset: str, name: str, leaf: Any) -> tuple[LayoutLike | None, str]:
    for pattern, layout, reason in PRESETS[preset]:
        is_named_so = re.search(f"{pattern}$", f"/{name}")
        if is_named_so and (layout is None or _fits(layout, leaf.ndim)):
            return layout, reason
    return None, _no_rule(leaf)


def _from_model(
    decisions: Mapping[str, Decision], name: str, leaf: Any
) -> tuple[LayoutLike | None, str]:
    return decisions.get(name, (None, _no_rule(leaf)))


def _from_function(
    function: Callable[[str, Any], Answer], name: str, leaf: Any
) -> tuple[LayoutLike | None, str]:
    return _as_given(function(name, leaf))


def _mapping_rule(layouts: Mapping[str, Answer], names: list[str], complete: bool) -> NameRule:
    keys = first_keys(layouts, names, what="layouts", complete=complete)

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
