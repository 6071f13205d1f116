"""What is done to the gradients or to the weights of an optimizer, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from keras import ops

import gcx
from gcx.layout import Layout
from gcx.plan import Plan, PlanRow

Where = Literal["gradient", "update"]
Decay = Literal["inside", "outside"]

# From the variables of an optimizer to the decision on each.
FindRows = Callable[[Sequence[Any]], list[PlanRow]]


class Projection:
    """Centralizes the gradients of an optimizer, or what its steps do to the weights.

    Parameters
    ----------
    find_rows : callable
        Says what is to be done with the variables of the optimizer, once they are known.
    plan : Plan
        What is expected of it until then.
    where, decay
        As in `gcx.keras.centralize`.
    """

    def __init__(self, find_rows: FindRows, plan: Plan, *, where: Where, decay: Decay) -> None:
        self.plan: Plan = plan
        self.where = where
        self.decay = decay
        self._find_rows = find_rows
        self._layouts: dict[int, Layout] = {}
        self._means: dict[int, Any] = {}

    def bind(self, variables: Sequence[Any]) -> None:
        """Find out what to do with the variables of the optimizer."""
        rows = self._find_rows(variables)
        pairs = zip(variables, rows, strict=True)
        self._layouts = {id(variable): row.layout for variable, row in pairs if row.layout}
        self.plan = Plan(rows)

    def centralized(self, arrays: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Centralize arrays that belong to variables."""
        layouts = [self._layouts.get(id(variable)) for variable in variables]
        return [
            array if layout is None else gcx.centralize(array, layout=layout)
            for array, layout in zip(arrays, layouts, strict=True)
        ]

    def hold_means(self, variables: Sequence[Any]) -> None:
        """Remember the means of the weights as they are now."""
        known = [v for v in variables if id(v) in self._layouts]
        self._means = {id(v): self._mean(v) for v in known}

    def restore_means(self, variables: Sequence[Any]) -> None:
        """Give the weights the means back that they had."""
        for variable in variables:
            if id(variable) in self._means:
                moved = self._mean(variable) - self._means.pop(id(variable))
                variable.assign(variable - ops.cast(moved, variable.dtype))

    def _mean(self, variable: Any) -> Any:
        axes = self._layouts[id(variable)].fan_in_axes(len(variable.shape))
        is_narrow = variable.dtype in NARROW_DTYPES
        wide = ops.cast(variable, "float32") if is_narrow else variable
        return ops.mean(wide, axis=axes, keepdims=True)


NARROW_DTYPES = ("float16", "bfloat16")
