"""Centralize gradients, or restore the means of weights, in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
from keras import ops

import gcx
from gcx.layout import Layout
from gcx.plan import Plan, PlanRow

Where = Literal["gradient", "update"]
Decay = Literal["inside", "outside"]

# From the variables of an optimizer to their rows.
FindRows = Callable[[Sequence[Any]], list[PlanRow]]


class Projection:
    """Centralizes the gradients of an optimizer, or the displacement of its weights.

    Parameters
    ----------
    find_rows : callable
        Makes the rows of the optimizer's variables, once these are known.
    plan : Plan
        The plan until then.
    where, decay, reproducible
        As in `gcx.keras.centralize`.
    """

    def __init__(
        self,
        find_rows: FindRows,
        plan: Plan,
        *,
        where: Where,
        decay: Decay,
        reproducible: bool,
    ) -> None:
        self.plan: Plan = plan
        self.where = where
        self.decay = decay
        self.reproducible = reproducible
        self._find_rows = find_rows
        self._layouts: dict[int, Layout] = {}
        self._held: dict[int, Any] = {}

    def bind(self, variables: Sequence[Any]) -> None:
        """Settle the layouts of the optimizer's variables."""
        rows = self._find_rows(variables)
        pairs = zip(variables, rows, strict=True)
        self._layouts = {id(variable): row.layout for variable, row in pairs if row.layout}
        self.plan = Plan(rows)

    def centralized(self, arrays: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Centralize arrays that belong to variables."""
        layouts = [self._layouts.get(id(variable)) for variable in variables]
        return [
            array if layout is None else self._centralized(array, layout)
            for array, layout in zip(arrays, layouts, strict=True)
        ]

    def hold_means(self, variables: Sequence[Any]) -> None:
        """Remember the present means of the weights."""
        hold = ops.copy if self.reproducible else self._mean
        self._held = {id(v): hold(v) for v in variables if id(v) in self._layouts}

    def restore_means(self, variables: Sequence[Any]) -> None:
        """Shift the weights back to the means that were remembered."""
        restore = self._restore_in_order if self.reproducible else self._restore_mean
        for variable in variables:
            if id(variable) in self._held:
                restore(variable, self._held.pop(id(variable)))

    def _restore_mean(self, variable: Any, mean: Any) -> None:
        moved = self._mean(variable) - mean
        variable.assign(variable - ops.cast(moved, variable.dtype))

    def _restore_in_order(self, variable: Any, start: Any) -> None:
        # A mean by Keras has no fixed order, so the displacement is centralized instead.
        start = _wide(start)
        moved = self._centralized(_wide(variable) - start, self._layouts[id(variable)])
        variable.assign(ops.cast(start + moved, variable.dtype))

    def _centralized(self, array: Any, layout: Layout) -> Any:
        return gcx.centralize(array, layout=layout, reproducible=self.reproducible)

    def _mean(self, variable: Any) -> Any:
        layout, shape = self._layouts[id(variable)], tuple(variable.shape)
        view, axes = layout.split(shape)
        if not layout.is_split:
            return ops.mean(_wide(variable), axis=axes, keepdims=True)
        mean = ops.mean(ops.reshape(_wide(variable), view), axis=axes, keepdims=True)
        return ops.reshape(ops.broadcast_to(mean, view), shape)


NARROW_DTYPES = ("float16", "bfloat16")


def _wide(array: Any) -> Any:
    is_narrow = keras.backend.standardize_dtype(array.dtype) in NARROW_DTYPES
    return ops.cast(array, "float32") if is_narrow else ops.convert_to_tensor(array)
