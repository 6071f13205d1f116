"""Gradient Centralization for one optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from gcx._dispatch import backend_for
from gcx._names import naming
from gcx.keras._optimizer import GradientCentralization, attach
from gcx.keras._plan import Overrides, decide, plan
from gcx.keras._projection import NARROW_DTYPES, Decay, Projection, Where
from gcx.plan import Plan, PlanRow

# Where the step of an optimizer is changed, and what must be Keras's own for that to be reached.
_CHANGED = ("_apply_weight_decay", "_backend_update_step")
_KERAS_OWN = ("apply", "_backend_apply_gradients")


def centralize(
    optimizer: Any,
    model: Any,
    *,
    where: Where = "gradient",
    decay: Decay | None = None,
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> GradientCentralization:
    r"""Let an optimizer use Gradient Centralization from its next step on.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Any optimizer of Keras 3 on torch or JAX; it goes on being used as before. Of a
        `LossScaleOptimizer`, the one inside is centralized.
    model : keras.Model or keras.Layer
        The model, built, all of whose layers say where the fan-in of their weights is. It must
        hold every variable of the optimizer.
    where : {"gradient", "update"}, optional
        ``"gradient"`` centralizes the gradients. ``"update"`` centralizes the displacement of the
        weights by the step, which the authors advise for adaptive optimizers; it keeps the mean of
        each weight over its fan-in constant with any optimizer.
    decay : {"inside", "outside"}, optional
        Whether ``weight_decay`` is projected as well. Keras applies it to the weights, apart from
        the gradient: with ``where="gradient"`` it is always outside. With ``where="update"`` the
        default is inside; outside, it goes on shrinking the mean by ``1 - learning_rate *
        weight_decay`` a step. A ``kernel_regularizer`` is part of the gradient, so inside both.
    overrides : mapping from str to Layout, str, LeaveAlone or None, optional
        As in `plan`.
    reproducible : bool, optional
        Whether means are taken in the one order that gives equal bits everywhere (see
        :doc:`/reproducible`): what is centralized, the gradient or the displacement, then has equal
        bits afterwards wherever it had before. The rest of the step is left to Keras.

    Returns
    -------
    GradientCentralization
        A handle: ``.plan`` shows what is centralized and why, ``.remove()`` ends it. It is also
        ``optimizer.gradient_centralization``.

    Raises
    ------
    TypeError
        If `optimizer` is not an optimizer of Keras or has a step of its own kind, as
        `MultiOptimizer` has; if `model` is not a layer; if `reproducible` cannot be promised for
        the dtype of a variable or where it is (JAX on anything but a CPU).
    ValueError
        As `plan`; if the optimizer already has Gradient Centralization, nothing would be
        centralized, or `where` and `decay` do not go together. When the optimizer is built: if one
        of its variables is not in the model.
    RuntimeError
        If the backend of Keras is not torch or JAX.

    Warns
    -----
    UserWarning
        If weights narrower than 32 bits are to be centralized in the update.

    See Also
    --------
    plan : what would be centralized.
    gcx.centralize : the operator, for one gradient.

    Notes
    -----
    A step of Keras unscales and accumulates the gradients, clips them, decays the weights, updates
    them, takes their moving average, and applies constraints. ``where="gradient"`` comes after the
    clipping, ``where="update"`` is about the decay and the update. Hence neither clipping nor
    accumulation nor moving averages lead the mean of a weight astray; a constraint may.

    With ``where="gradient"``, SGD without ``weight_decay`` keeps the mean of each weight where it
    was (corollary 4.1). Its momentum from steps before this call would go on moving that mean, and
    is centralized now. Optimizers that divide the gradient element by element, such as Adam, keep
    the mean only with ``where="update"``.

    Models saved with their optimizer are loaded with Gradient Centralization, if ``gcx.keras`` has
    been imported; an error is raised otherwise. Momentum that is loaded later, of a run without
    it, is not centralized.

    References
    ----------
    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, algorithms 1 and 2. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> import gcx.keras
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    >>> gcx.keras.centralize(optimizer, model)
    <GradientCentralization of SGD, where='gradient', <gcx plan: 1 of 2 parameters centralized>>
    >>> model.compile(optimizer, loss="mse")
    >>> start = keras.ops.convert_to_numpy(model.weights[0]).mean()
    >>> x, y = np.random.default_rng(0).random((2, 8, 3), dtype="float32")
    >>> _ = model.fit(x, y[:, :1], epochs=10, verbose=0)
    >>> moved = keras.ops.convert_to_numpy(model.weights[0]).mean() - start
    >>> bool(abs(moved) < 1e-6)
    True
    """
    _check_choices(where, decay)
    optimizer = _innermost(optimizer)
    _check_optimizer(optimizer)
    expected = plan(model, overrides=overrides)
    if not any(row.layout for row in expected):
        msg = f"there is nothing to centralize in {model.name}:\n{expected}"
        raise ValueError(msg)
    if reproducible:
        _check_reproducible(model, expected)

    def rows_of(variables: Sequence[Any]) -> list[PlanRow]:
        decided = decide(model, overrides)
        _check_all_known(variables, decided)
        return [decided[id(variable)] for variable in variables]

    inherent: Decay = "inside" if where == "update" else "outside"
    projection = Projection(
        rows_of, expected, where=where, decay=decay or inherent, reproducible=reproducible
    )
    handle = attach(optimizer, projection)
    if where == "update":
        _warn_of_low_precision(model, expected)
    else:
        _centralize_momentum(optimizer, projection)
    _renew_compiled_step(model, optimizer)
    return handle


def _check_choices(where: object, decay: object) -> None:
    if where not in ("gradient", "update"):
        msg = f"where is 'gradient' or 'update', not {where!r}"
        raise ValueError(msg)
    if decay not in (None, "inside", "outside"):
        msg = f"decay is 'inside', 'outside' or None, not {decay!r}"
        raise ValueError(msg)
    if where == "gradient" and decay == "inside":
        msg = (
            "decay='inside' needs where='update': Keras applies weight_decay apart from the "
            "gradient. A kernel_regularizer, which is part of it, is inside already"
        )
        raise ValueError(msg)


def _innermost(optimizer: Any) -> Any:
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _check_optimizer(optimizer: Any) -> None:
    if keras.backend.backend() not in ("torch", "jax"):
        msg = (
            f"gcx.keras needs the backend torch or jax, not {keras.backend.backend()}; set the "
            "environment variable KERAS_BACKEND before Keras is imported"
        )
        raise RuntimeError(msg)
    base, kind = keras.optimizers.Optimizer, type(optimizer)
    if not isinstance(optimizer, base):
        msg = f"optimizer is a keras.optimizers.Optimizer, not a {kind.__name__}"
        raise TypeError(msg)
    if hasattr(optimizer, "gradient_centralization"):
        msg = "this optimizer has Gradient Centralization already; .remove() that handle first"
        raise ValueError(msg)
    is_keras_own = all(getattr(kind, name) is getattr(base, name) for name in _KERAS_OWN)
    if not is_keras_own or not all(hasattr(base, name) for name in _CHANGED):
        msg = (
            f"{kind.__name__} of Keras {keras.__version__} has a step of its own, in which there "
            "is no place for Gradient Centralization; if it holds other optimizers, give those"
        )
        raise TypeError(msg)


def _check_all_known(variables: Sequence[Any], decided: Mapping[int, PlanRow]) -> None:
    unknown = [variable.path for variable in variables if id(variable) not in decided]
    if unknown:
        msg = (
            f"the optimizer is to train {unknown[0]}, which is not in the model that was given to "
            "gcx.keras.centralize; give it the model that holds them all"
        )
        raise ValueError(msg)


def _check_reproducible(model: Any, expected: Plan) -> None:
    for variable, row in zip(model.trainable_variables, expected, strict=True):
        if row.layout:
            with naming(row.name):
                axes = row.layout.fan_in_axes(len(row.shape))
                backend_for(variable.value).check_reproducible(variable.value, axes)


def _warn_of_low_precision(model: Any, expected: Plan) -> None:
    for variable, row in zip(model.trainable_variables, expected, strict=True):
        if row.layout and variable.dtype in NARROW_DTYPES:
            msg = (
                f"{row.name} is {variable.dtype}: rounding the weights loses most of what "
                "where='update' does; keep float32 weights, or use where='gradient'"
            )
            warnings.warn(msg, UserWarning, stacklevel=3)
            return


def _centralize_momentum(optimizer: Any, projection: Projection) -> None:
    """Take out of running sums of past gradients the mean that would go on moving the weights."""
    if optimizer.built and isinstance(optimizer, keras.optimizers.SGD) and optimizer.momentum:
        variables = vars(optimizer)["_trainable_variables"]
        values = [buffer.value for buffer in optimizer.momentums]
        centralized = projection.centralized(values, variables)
        for buffer, value in zip(optimizer.momentums, centralized, strict=True):
            buffer.assign(value)


def _renew_compiled_step(model: Any, optimizer: Any) -> None:
    """Let the model forget the step that it has compiled, without Gradient Centralization."""
    if _innermost(getattr(model, "optimizer", None)) is optimizer:
        if model.train_function is not None:
            model.make_train_function(force=True)
    elif int(optimizer.iterations) and keras.backend.backend() == "jax":
        msg = (
            "this optimizer has taken steps already: what JAX has compiled goes on without "
            "Gradient Centralization. Compile it again: model.make_train_function(force=True), or "
            "jax.jit of a new function"
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
