"""A Keras optimizer with Gradient Centralization in its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import keras

import gcx
from gcx._means import fan_in_mean, restore_mean
from gcx._options import Options
from gcx.layout import Layout
from gcx.plan import Plan, PlanRow

_SAVED = ("where", "decay", "strength", "reproducible")  # the plan holds the other options
_register = keras.saving.register_keras_serializable("gcx", "Centralized")


@_register
class Centralized(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Class that `gcx.keras.centralize` puts in front of an optimizer's own.

    Keras saves a centralized optimizer under this name, and loads it with its plan. Import
    ``gcx.keras`` before that; without it, loading raises an error. See :doc:`/keras`.
    """

    gradient_centralization: GradientCentralization  # also after loading

    def build(self, variables: Sequence[Any]) -> None:
        """Settle the layouts of the variables, and create the optimizer's own variables."""
        # The legacy .h5 format knows no variables yet. Keras refuses to train such a model.
        if variables:
            self.gradient_centralization.bind(variables)
        super().build(variables)

    # In each step that changes the weights, Keras calls these two in a row: after accumulation and
    # clipping of the gradients, before moving averages and constraints of the weights.

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        handle = self.gradient_centralization
        is_inside = handle.options.decay == "inside"
        if is_inside:
            handle.hold_means(variables)
        super()._apply_weight_decay(variables)
        if not is_inside:
            handle.hold_means(variables)

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        handle = self.gradient_centralization
        if handle.options.where == "gradient":
            grads = handle.centralized(grads, trainable_variables)
        super()._backend_update_step(grads, trainable_variables, learning_rate)
        handle.restore_means(trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """Describe the optimizer and the plan of its variables."""
        handle = self.gradient_centralization
        return {
            "optimizer": keras.optimizers.serialize(handle.plain_optimizer()),
            "plan": [
                [name, shape, layout and (str(layout), layout.sizes), reason]
                for name, shape, layout, reason in handle.plan
            ],
            **{name: getattr(handle.options, name) for name in _SAVED},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make a centralized optimizer for the same variables in the same order."""
        optimizer = keras.optimizers.deserialize(config["optimizer"], custom_objects)
        rows = [
            PlanRow(name, tuple(shape), layout and Layout(layout[0], **layout[1]), reason)
            for name, shape, layout, reason in config["plan"]
        ]

        def saved_rows(variables: Sequence[Any]) -> list[PlanRow]:
            saved, found = [row.shape for row in rows], [tuple(v.shape) for v in variables]
            if saved != found:
                raise ValueError(
                    f"this centralized optimizer was saved for {len(saved)} variables of shapes "
                    f"{saved}, but is to train {len(found)} of shapes {found}. For another model "
                    "make a new optimizer and gcx.keras.centralize it"
                )
            return rows

        # Earlier configs have no strength.
        options = Options(**{name: config[name] for name in _SAVED if name in config})
        GradientCentralization(optimizer, saved_rows, Plan(rows), options)
        return optimizer


class GradientCentralization:
    """Handle for the Gradient Centralization of one optimizer, from `gcx.keras.centralize`.

    Attributes
    ----------
    plan : gcx.plan.Plan
        The decision on each variable of the optimizer, with its reason.
    """

    def __init__(
        self,
        optimizer: Any,
        find_rows: Callable[[Sequence[Any]], list[PlanRow]],
        plan: Plan,
        options: Options,
    ) -> None:
        self.plan: Plan = plan  # until the variables of the optimizer are known
        self.options: Options = options
        self._how: dict[str, Any] = {"strength": options.strength}
        self._how["reproducible"] = options.reproducible
        self._find_rows = find_rows
        self._layouts: dict[int, Layout] = {}
        self._held: dict[int, Any] = {}
        kind: type = type(optimizer)
        self._optimizer, self._kind = optimizer, kind
        if optimizer.built:
            self.bind(vars(optimizer)["_trainable_variables"])
        # A new optimizer would lack the fast steps that Keras has for torch.
        optimizer.__class__ = _centralized(kind)
        optimizer.gradient_centralization = self

    def remove(self) -> None:
        """Leave the optimizer as it was before; a second call does nothing.

        A train step that JAX has compiled goes on as it is until
        ``model.make_train_function(force=True)`` or ``model.compile``.
        """
        if getattr(self._optimizer, "gradient_centralization", None) is self:
            del self._optimizer.gradient_centralization
            self._optimizer.__class__ = self._kind

    def plain_optimizer(self) -> Any:
        """Make an optimizer with the same state and its original class, to serialize it."""
        plain: Any = object.__new__(self._kind)
        vars(plain).update(vars(self._optimizer))
        return plain

    def __repr__(self) -> str:
        name, kind = type(self).__name__, self._kind.__name__
        return f"<{name} of {kind}, where={self.options.where!r}, {self.plan!r}>"

    # For the steps of `Centralized`.

    def bind(self, variables: Sequence[Any]) -> None:
        rows = self._find_rows(variables)
        pairs = zip(variables, rows, strict=True)
        self._layouts = {id(variable): row.layout for variable, row in pairs if row.layout}
        self.plan = Plan(rows)

    def centralized(self, arrays: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        layouts = [self._layouts.get(id(variable)) for variable in variables]
        return [
            array if layout is None else gcx.centralize(array, layout=layout, **self._how)
            for array, layout in zip(arrays, layouts, strict=True)
        ]

    def hold_means(self, variables: Sequence[Any]) -> None:
        for v in variables if self.options.where == "update" else ():
            if layout := self._layouts.get(id(v)):
                weight = keras.ops.stop_gradient(v.value)
                mean = fan_in_mean(weight, layout, reproducible=self.options.reproducible)
                self._held[id(v)] = mean

    def restore_means(self, variables: Sequence[Any]) -> None:
        for v in variables:
            if id(v) in self._held:
                weight, mean = keras.ops.stop_gradient(v.value), self._held.pop(id(v))
                v.assign(restore_mean(weight, mean, self._layouts[id(v)], **self._how))


@cache
def _centralized(kind: type) -> type:
    # A name from Keras would load a Keras optimizer. All such classes load in the same way, so they
    # share one registered name.
    mixed = type(f"Centralized{kind.__name__}", (Centralized, kind), {"__module__": __name__})
    return _register(mixed)  # type: ignore[no-any-return]
