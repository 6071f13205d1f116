"""Attach Gradient Centralization to an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras

from gcx._decisions import already_attached, check_reproducible, narrow_weight, refuse_empty
from gcx._frameworks import describe
from gcx._options import Decay, Layers, Options, Where
from gcx.keras._optimizer import GradientCentralization
from gcx.keras._plan import Overrides, decide, plan
from gcx.plan import PlanRow

# Methods that a centralized optimizer overrides, and Keras's methods that call them.
_CHANGED = ("_apply_weight_decay", "_backend_update_step")
_KERAS_OWN = ("apply", "_backend_apply_gradients")


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
    options = Options(
        where=where,
        decay=("inside" if where == "update" else "outside") if decay is None else decay,
        strength=strength,
        layers=layers,
        overrides=overrides,
        reproducible=reproducible,
    )
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
