"""A Keras optimizer with Gradient Centralization in its step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import keras

from gcx.keras._projection import Projection
from gcx.layout import Layout
from gcx.plan import Plan, PlanRow

_register = keras.saving.register_keras_serializable("gcx", "Centralized")


@_register
class Centralized(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Class that `gcx.keras.centralize` adds to an optimizer, in front of its own.

    Keras saves a centralized optimizer under this name, and loads it with its plan. Import
    ``gcx.keras`` before that; without it, loading raises an error.

    Attributes
    ----------
    gradient_centralization : GradientCentralization
        The handle, also after loading.

    Examples
    --------
    >>> import keras
    >>> import gcx.keras
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> optimizer = keras.optimizers.SGD(0.1)
    >>> handle = gcx.keras.centralize(optimizer, model)
    >>> isinstance(optimizer, gcx.keras.Centralized), isinstance(optimizer, keras.optimizers.SGD)
    (True, True)
    >>> config = keras.optimizers.serialize(optimizer)
    >>> keras.optimizers.deserialize(config).gradient_centralization
    <GradientCentralization of SGD, where='gradient', <gcx plan: 1 of 2 parameters centralized>>
    """

    gradient_centralization: GradientCentralization

    def build(self, variables: Sequence[Any]) -> None:
        """Settle the layouts of the variables, and create the optimizer's own variables."""
        # The legacy .h5 format builds the optimizer before the model's variables are known. Keras
        # raises an error if such a model is trained.
        if variables:
            self._projection.bind(variables)
        super().build(variables)

    # In each step that changes the weights, Keras calls these two in a row: after accumulation and
    # clipping of the gradients, before moving averages and constraints of the weights.

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        projection = self._projection
        if projection.where == "update" and projection.decay == "inside":
            projection.hold_means(variables)
        super()._apply_weight_decay(variables)
        if projection.where == "update" and projection.decay == "outside":
            projection.hold_means(variables)

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        projection = self._projection
        if projection.where == "gradient":
            grads = projection.centralized(grads, trainable_variables)
        super()._backend_update_step(grads, trainable_variables, learning_rate)
        if projection.where == "update":
            projection.restore_means(trainable_variables)

    @property
    def _projection(self) -> Projection:
        return self.gradient_centralization.projection

    def get_config(self) -> dict[str, Any]:
        """Describe the optimizer and the plan of its variables."""
        projection = self._projection
        return {
            "optimizer": keras.optimizers.serialize(self.gradient_centralization.plain_optimizer()),
            "plan": [[*row[:2], _plain_layout(row.layout), row.reason] for row in projection.plan],
            "where": projection.where,
            "decay": projection.decay,
            "reproducible": projection.reproducible,
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
            _check_same_shapes(rows, variables)
            return rows

        projection = Projection(
            saved_rows,
            Plan(rows),
            where=config["where"],
            decay=config["decay"],
            reproducible=config["reproducible"],
        )
        attach(optimizer, projection)
        return optimizer


class GradientCentralization:
    """Handle for the Gradient Centralization of one optimizer.

    `gcx.keras.centralize` returns it.

    Examples
    --------
    >>> import keras
    >>> import gcx.keras
    >>> head = keras.layers.Dense(2, name="head")
    >>> model = keras.Sequential([keras.Input((3,)), head], name="net")
    >>> optimizer = keras.optimizers.Adam()
    >>> handle = gcx.keras.centralize(optimizer, model, where="update")
    >>> print(handle.plan)
    parameter        shape  layout  reason
    net/head/kernel  3x2    ...o    Dense
    net/head/bias    2      -       bias
    1 of 2 parameters centralized
    >>> handle.remove()
    >>> isinstance(optimizer, gcx.keras.Centralized)
    False
    """

    def __init__(self, optimizer: Any, projection: Projection) -> None:
        self.projection = projection
        self._optimizer = optimizer
        self._kind = type(optimizer)

    @property
    def plan(self) -> Plan:
        """The decision on each variable of the optimizer, with its reason."""
        return self.projection.plan

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
        plain = object.__new__(self._kind)
        vars(plain).update(vars(self._optimizer))
        return plain

    def __repr__(self) -> str:
        name, kind = type(self).__name__, self._kind.__name__
        return f"<{name} of {kind}, where={self.projection.where!r}, {self.plan!r}>"


def attach(optimizer: Any, projection: Projection) -> GradientCentralization:
    """Let an optimizer use a projection from its next step on."""
    kind: type = type(optimizer)
    handle = GradientCentralization(optimizer, projection)
    if optimizer.built:
        projection.bind(vars(optimizer)["_trainable_variables"])
    # A new optimizer would lack the fast steps that Keras has for torch.
    optimizer.__class__ = _centralized(kind)
    optimizer.gradient_centralization = handle
    return handle


@cache
def _centralized(kind: type) -> type:
    # A name from Keras would load a Keras optimizer. All such classes load in the same way, so they
    # share one registered name.
    mixed = type(f"Centralized{kind.__name__}", (Centralized, kind), {"__module__": __name__})
    return _register(mixed)  # type: ignore[no-any-return]


def _plain_layout(layout: Layout | None) -> tuple[str, dict[str, int]] | None:
    return None if layout is None else (str(layout), layout.sizes)


def _check_same_shapes(rows: Sequence[PlanRow], variables: Sequence[Any]) -> None:
    saved, found = [r.shape for r in rows], [tuple(v.shape) for v in variables]
    if saved != found:
        msg = (
            f"this centralized optimizer was saved for {len(saved)} variables of shapes {saved}, "
            f"but is to train {len(found)} of shapes {found}. For another model make a new "
            "optimizer and gcx.keras.centralize it"
        )
        raise ValueError(msg)
