"""Gradient Centralization in the steps of a thinc optimizer."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from thinc.api import Model, Optimizer
from thinc.backends import get_array_ops

import gcx
from gcx._decisions import already_attached, check_reproducible, refuse_empty
from gcx._frameworks import describe
from gcx._means import fan_in_mean, restore_mean, subtract_mean
from gcx._options import Options, Where
from gcx.layout import Layout
from gcx.plan import Plan
from gcx.thinc._plan import Key, Models, Overrides, decide, walk


def centralize(
    optimizer: Optimizer,
    *models: Model[Any, Any],
    where: Where = "gradient",
    strength: float = 1.0,
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> GradientCentralization:
    r"""Let an optimizer use Gradient Centralization from its next step on.

    SGD without weight decay then keeps the mean of each weight (Corollary 4.1); Adam and RAdam do
    so with ``where="update"``. See :doc:`/thinc` for L2, clipping and moving averages.

    Parameters
    ----------
    optimizer : thinc.optimizers.Optimizer
        Use it as before, by ``model.finish_update`` or in spaCy.
    *models : thinc.model.Model
        All models that the optimizer trains, initialized. In spaCy: the models of the components.
    where : {"gradient", "update"}, optional
        Centralize the gradient, in place, or the displacement of the weights by the step.
    strength, reproducible, overrides
        As in `gcx.centralize` and `plan`.

    Returns
    -------
    GradientCentralization
        A handle with ``.plan`` and ``.remove()``.

    Raises
    ------
    TypeError, ValueError
        As `plan`; if optimizer and options do not fit, or there is nothing to centralize.
    RuntimeError
        In a step: if the parameter is in none of the models.

    Warns
    -----
    UserWarning
        If the optimizer is copied or pickled: its copy does not centralize.

    Examples
    --------
    >>> from thinc.api import SGD, Linear
    >>> import gcx.thinc
    >>> optimizer, model = SGD(0.1), Linear(nO=2, nI=3).initialize()
    >>> handle = gcx.thinc.centralize(optimizer, model)
    >>> handle.plan
    <gcx plan: 1 of 2 parameters centralized>
    >>> handle.remove()
    """
    options = Options(
        where=where, strength=strength, overrides=overrides, reproducible=reproducible
    )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a thinc.api.Optimizer, not {describe(optimizer, 'thinc')}")
    if hasattr(optimizer, "gradient_centralization"):
        raise ValueError(already_attached("optimizer", "its .gradient_centralization.remove()"))
    return GradientCentralization(optimizer, models, options)


class GradientCentralization:
    """Handle for the Gradient Centralization of one optimizer, from `gcx.thinc.centralize`."""

    def __init__(self, optimizer: Any, models: Models, options: Options) -> None:
        self._models, self._optimizer, self._options = models, optimizer, options
        self._kind = kind = type(optimizer)
        self._how: dict[str, Any] = {"strength": options.strength}
        self._how["reproducible"] = options.reproducible
        self._layouts: dict[Key, Layout | None] = {}
        self._decide()
        refuse_empty(self.plan, "these models")
        if options.reproducible:
            for _, layer in walk(models):
                rows = [self._rows[layer.id, name] for name in layer.param_names]
                check_reproducible(rows, map(layer.get_param, layer.param_names))
        step = self._update_step if options.where == "update" else self._gradient_step

        def call(optimizer: Any, key: Key, *args: Any, **options: Any) -> Any:
            layout = self._layout_of(key)
            if layout is None:
                return kind.__call__(optimizer, key, *args, **options)
            return step(layout, optimizer, key, *args, **options)

        # Python looks for __call__ in the class, so each optimizer gets its own class. An
        # object takes a new class only if that has the same memory layout, hence the slots.
        own = {
            "__slots__": (),
            "__call__": call,
            "__reduce_ex__": _reduce_to_plain,
            "gradient_centralization": self,
        }
        optimizer.__class__ = type(f"Centralized{kind.__name__}", (kind,), own)

    @property
    def plan(self) -> Plan:
        """The decision on each parameter of the models, with its reason."""
        return Plan(self._rows.values())

    def remove(self) -> None:
        """Leave the optimizer as it was before; a second call does nothing."""
        if getattr(self._optimizer, "gradient_centralization", None) is self:
            self._optimizer.__class__ = self._kind

    def __repr__(self) -> str:
        name, kind = type(self).__name__, self._kind.__name__
        return f"<{name} of {kind}, where={self._options.where!r}, {self.plan!r}>"

    def _gradient_step(
        self, layout: Layout, optimizer: Any, key: Key, weights: Any, gradient: Any, **options: Any
    ) -> Any:
        gradient = gcx.centralize(gradient, layout=layout, out=gradient, **self._how)
        if not optimizer.L2_is_weight_decay:
            # The optimizer adds L2 * weights, whose mean is subtracted here in advance.
            l2 = optimizer.L2  # a number in thinc 8, a schedule in thinc 9
            if callable(l2):
                l2 = l2(optimizer.step, key=key, last_score=optimizer.last_score)
            mean = fan_in_mean(weights, layout, reproducible=self._options.reproducible)
            rate = self._options.strength * float(l2)
            gradient[...] = subtract_mean(gradient, rate * mean, layout)
        return self._kind.__call__(optimizer, key, weights, gradient, **options)

    def _update_step(
        self, layout: Layout, optimizer: Any, key: Key, weights: Any, gradient: Any, **options: Any
    ) -> Any:
        mean = fan_in_mean(weights, layout, reproducible=self._options.reproducible)
        # Moving averages are taken below, after the means are restored.
        averages, optimizer.averages = optimizer.averages, None
        try:
            weights, gradient = self._kind.__call__(optimizer, key, weights, gradient, **options)
        finally:
            optimizer.averages = averages
        weights[...] = restore_mean(weights, mean, layout, **self._how)
        if averages is not None:
            ops = get_array_ops(weights)  # type: ignore[no-untyped-call]
            if key not in averages:
                averages[key] = ops.alloc(weights.shape, dtype="float32")
            ops.update_averages(averages[key], weights, optimizer.nr_update[key])
        return weights, gradient

    def _decide(self) -> None:
        self._rows = decide(self._models, self._options.overrides)
        self._layouts |= {key: row.layout for key, row in self._rows.items()}

    def _layout_of(self, key: Key) -> Layout | None:
        if key not in self._layouts:
            self._decide()  # layers may have been added or replaced
        if key not in self._layouts:
            # Checked last: layers and shims are counted apart, so one may have the other's id.
            if key[0] not in {shim.id for _, layer in walk(self._models) for shim in layer.shims}:
                raise RuntimeError(
                    f"the optimizer trains {key[1]!r} of a layer that is not in the models given "
                    "to gcx.thinc.centralize; give it all of them: centralize(optimizer, *models)"
                )
            self._layouts[key] = None
        return self._layouts[key]


def _reduce_to_plain(optimizer: Any, _protocol: int) -> Any:
    """Copy or pickle a centralized optimizer as a plain one, with a warning."""
    centralized = type(optimizer)
    (kind,) = centralized.__bases__
    remedy = "call gcx.thinc.centralize for the copy and the models that it trains"
    msg = f"the copy of this {kind.__name__} does not centralize: {remedy}"
    warnings.warn(msg, UserWarning, stacklevel=2)
    optimizer.__class__ = kind
    try:
        plain = copy.copy(optimizer)
    finally:
        optimizer.__class__ = centralized
    # A reducer returns a function and its arguments, so a copy of the plain optimizer is made.
    return copy.copy, (plain,)
