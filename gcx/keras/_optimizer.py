"""Attach Gradient Centralization to a Keras optimizer, whose class then has it in its step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import keras

import gcx
from gcx._decisions import already_attached, check_reproducible, narrow_weight, refuse_empty
from gcx._frameworks import describe
from gcx._means import fan_in_mean, restore_mean
from gcx._options import Decay, Layers, Options, Where
from gcx.keras._plan import Overrides, decide, plan
from gcx.layout import Layout
from gcx.plan import Plan, PlanRow

# Methods that a centralized optimizer overrides, and Keras's methods that call them.
_CHANGED = ("_apply_weight_decay", "_backend_update_step")
_KERAS_OWN = ("apply", "_backend_apply_gradients")

_SAVED = ("where", "decay", "strength", "reproducible")  # the plan holds the other options
_register = keras.saving.register_keras_serializable("gcx", "Centralized")


def centralize(
    optimizer: Any,
    model: Any,
    *,
    where: Where = "gradient",
    decay: Decay = None,
    strength: float = 1.0,
    layers: Layers = "all",
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> GradientCentralization:
    r"""Let an optimizer use Gradient Centralization from its next step on.

    SGD without ``weight_decay`` then keeps the mean of each weight (Corollary 4.1); other
    optimizers, such as Adam, do so with ``where="update"``. See :doc:`/keras` for clipping, moving
    averages and saving.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Any Keras 3 optimizer on torch or JAX; use it as before. A `LossScaleOptimizer` has its
        inner optimizer centralized.
    model : keras.Model or keras.Layer
        The built model, which must hold every variable of the optimizer.
    where : {"gradient", "update"}, optional
        Centralize the gradients, or the displacement of the weights by the step.
    decay : {"inside", "outside"}, optional
        Project ``weight_decay`` too (inside) or not. ``where="gradient"`` allows outside only, as
        Keras applies the decay to the weights; the default of ``where="update"`` is inside.
    strength, reproducible, layers, overrides
        As in `gcx.centralize` and `plan`.

    Returns
    -------
    GradientCentralization
        A handle with ``.plan`` and ``.remove()``; also ``optimizer.gradient_centralization``.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `plan`; if optimizer, model and options do not fit, there is nothing to centralize, or
        the backend is not torch or JAX; later, if the model lacks a variable.

    Warns
    -----
    UserWarning
        If ``where="update"`` meets weights below 32 bits, or JAX has compiled a step already.

    Examples
    --------
    >>> import keras
    >>> import gcx.keras
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    >>> handle = gcx.keras.centralize(optimizer, model)
    >>> handle
    <GradientCentralization of SGD, where='gradient', <gcx plan: 1 of 2 parameters centralized>>
    >>> model.compile(optimizer, loss="mse")
    >>> handle.remove()
    """
    if decay is None:
        decay = "inside" if where == "update" else "outside"
    options = Options(where, decay, strength, layers, overrides, reproducible)
    if where == "gradient" and decay == "inside":
        raise ValueError(
            "decay='inside' needs where='update': Keras applies weight_decay apart from the "
            "gradient. A kernel_regularizer, which is part of it, is inside already"
        )
    optimizer = _innermost(optimizer)
    _check_optimizer(optimizer)
    expected = plan(model, layers=layers, overrides=overrides)
    refuse_empty(expected, model.name)
    if reproducible:
        check_reproducible(expected, [variable.value for variable in model.trainable_variables])

    def rows_of(variables: Sequence[Any]) -> list[PlanRow]:
        decided = decide(model, options)
        for variable in variables:
            if id(variable) not in decided:
                why = "which is not in the model; give gcx.keras.centralize one with every variable"
                raise ValueError(f"the optimizer is to train {variable.path}, {why}")
        return [decided[id(variable)] for variable in variables]

    handle = GradientCentralization(optimizer, rows_of, expected, options)
    if where == "gradient":
        _centralize_momentum(optimizer, handle)
    for variable, row in zip(model.trainable_variables, expected, strict=True):
        if where == "update" and row.layout and variable.dtype in ("float16", "bfloat16"):
            warnings.warn(narrow_weight(row.name, variable.dtype), UserWarning, stacklevel=2)
            break
    _renew_compiled_step(model, optimizer)
    return handle


def _innermost(optimizer: Any) -> Any:
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _check_optimizer(optimizer: Any) -> None:
    if (backend := keras.backend.backend()) not in ("torch", "jax"):
        remedy = "set the environment variable KERAS_BACKEND before Keras is imported"
        raise RuntimeError(f"gcx.keras needs the backend torch or jax, not {backend}; {remedy}")
    base, kind = keras.optimizers.Optimizer, type(optimizer)
    if not isinstance(optimizer, base):
        raise TypeError(
            f"optimizer is a keras.optimizers.Optimizer, not {describe(optimizer, 'keras')}"
        )
    if hasattr(optimizer, "gradient_centralization"):
        raise ValueError(already_attached(kind.__name__, "its .gradient_centralization.remove()"))
    is_keras_own = all(getattr(kind, name) is getattr(base, name) for name in _KERAS_OWN)
    if not is_keras_own or not all(hasattr(base, name) for name in _CHANGED):
        remedy = "if it holds other optimizers, centralize those"
        raise TypeError(
            f"{kind.__name__} of Keras {keras.__version__} has a step of its own; {remedy}"
        )


def _centralize_momentum(optimizer: Any, handle: GradientCentralization) -> None:
    """Subtract the fan-in mean from momentum that uncentralized gradients left."""
    is_whole = handle.options.strength == 1.0  # otherwise momentum rightly has a mean
    is_sgd = optimizer.built and isinstance(optimizer, keras.optimizers.SGD)
    if is_whole and is_sgd and optimizer.momentum:
        values = [buffer.value for buffer in optimizer.momentums]
        centralized = handle.centralized(values, vars(optimizer)["_trainable_variables"])
        for buffer, value in zip(optimizer.momentums, centralized, strict=True):
            buffer.assign(value)


def _renew_compiled_step(model: Any, optimizer: Any) -> None:
    """Let the model compile its step again, with Gradient Centralization."""
    if _innermost(getattr(model, "optimizer", None)) is optimizer:
        if model.train_function is not None:
            model.make_train_function(force=True)
    elif int(optimizer.iterations) and keras.backend.backend() == "jax":
        msg = (
            "this optimizer has taken steps already; compile a jitted step again, or it goes on "
            "without Gradient Centralization: model.make_train_function(force=True)"
        )
        warnings.warn(msg, UserWarning, stacklevel=3)


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
        plain: Any = object.__new__(type(self).__bases__[1])  # of its original class
        vars(plain).update(vars(self))
        return {
            "optimizer": keras.optimizers.serialize(plain),
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

        options = Options(**{name: config[name] for name in _SAVED})
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
        self._how: Any = {"strength": options.strength, "reproducible": options.reproducible}
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
