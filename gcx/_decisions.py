"""Decisions and errors that all adapters share: a rule's answer becomes a row of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from gcx._centralize import see_fan_in
from gcx._names import match_all, naming
from gcx._rules import NO_RULE, UNDECLARED, Answer
from gcx.layout import Layout, as_layout
from gcx.plan import LeaveAlone, Plan, PlanRow

LEFT_ALONE = LeaveAlone("left alone by an override")


def decide_row(name: str, shape: tuple[int, ...], answer: Answer, rule: str) -> PlanRow:
    """Turn the answer of a rule about one parameter into its row; `rule` is the rule's name."""
    if answer is None:
        answer = LeaveAlone(f"left alone by the rule of {rule}")
    if isinstance(answer, LeaveAlone):
        vector = no_fan_in(shape) if answer.reason.startswith((UNDECLARED, NO_RULE)) else ""
        return PlanRow(name, shape, None, vector or answer.reason)
    with naming(name):
        layout = as_layout(answer)
        view, axes = layout.split(shape)
    size = prod(view[axis] for axis in axes)
    if isinstance(size, int) and size < 2:  # it may be a symbol in a JAX export
        few_axes = None if axes else no_fan_in(shape)
        obstacle = few_axes or f"fan-in {size}: subtracting its mean would freeze it"
        return PlanRow(name, shape, None, obstacle)
    return PlanRow(name, shape, layout, rule)


def no_fan_in(shape: tuple[int, ...]) -> str:
    """Return the reason to leave a vector or a scalar alone; empty for other shapes."""
    return "" if len(shape) > 1 else f"a {('scalar', 'vector')[len(shape)]} has no fan-in"


def merge(rows: Sequence[PlanRow]) -> PlanRow:
    """Make one row for a parameter that layers share: left alone unless they agree."""
    first = rows[0]
    # Two layouts with different texts may mean the same axes.
    if len({row.layout and row.layout.split(row.shape) for row in rows}) == 1:
        return first
    reasons: dict[str, str] = {}
    for row in rows:
        told = row.reason if row.name == first.name else f"{row.name}: {row.reason}"
        reasons.setdefault(row.reason, told)
    reason = f"tied, and the rules differ: {'; '.join(reasons.values())}"
    return first._replace(layout=None, reason=reason)


def find_overrides(
    overrides: Mapping[str, Answer], names: Iterable[str]
) -> dict[str, Layout | LeaveAlone]:
    """Find the override of each name: the answer of the first key that matches it."""
    keys = match_all(overrides, names, what="overrides")
    answers: dict[str, Layout | LeaveAlone] = {}
    for key, value in overrides.items():
        with naming(f"overrides: {key}"):
            answer = LEFT_ALONE if value is None else value
            answers[key] = answer if isinstance(answer, LeaveAlone) else as_layout(answer)
    return {name: answers[key] for name, key in keys.items()}


def refuse_empty(plan: Plan, owner: str, *, hint: str = "") -> None:
    """Raise a ValueError if no parameter is centralized; the hint is for unknown parameters."""
    if all(row.layout is None for row in plan):
        is_unknown = any(row.reason.startswith("unknown") for row in plan)
        hint = f"\n{hint}" if hint and is_unknown else ""
        raise ValueError(f"there is nothing to centralize in {owner}:\n{plan}{hint}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}")


def check_reproducible(plan: Iterable[PlanRow], arrays: Iterable[Any]) -> None:
    for row, array in zip(plan, arrays, strict=True):
        if row.layout is not None:
            with naming(row.name):
                see_fan_in(array, row.layout, reproducible=True)


def already_attached(kind: str, remedy: str) -> str:
    return f"this {kind} has Gradient Centralization already; first call {remedy}"


def narrow_weight(name: str, dtype: object) -> str:
    return (
        f"{name} is {dtype}: rounding the weights loses most of what where='update' does; keep "
        "float32 weights, or use where='gradient'"
    )
