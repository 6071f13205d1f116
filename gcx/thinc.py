"""Gradient Centralization for thinc optimizers, with which spaCy trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import gcx
from gcx._decisions import (
    already_attached,
    check_reproducible,
    decide_row,
    find_overrides,
    refuse_empty,
)
from gcx._frameworks import describe, needing
from gcx._means import fan_in_mean, restore_mean, subtract_mean
from gcx._options import Options, Where
from gcx._rules import BIAS, EMBEDDING, NORM, UNDECLARED, Answer, Register, Rules
from gcx.layout import Layout
from gcx.plan import LeaveAlone, Plan, PlanRow

with needing("thinc", '"gcx[thinc]"'):
    from thinc.api import Model, Optimizer
    from thinc.backends import get_array_ops

__all__ = ["GradientCentralization", "centralize", "plan", "register_layer"]

# The id of a layer and the name of its parameter, by which thinc's optimizers know a parameter.
Key = tuple[int, str]
Models = tuple[Model[Any, Any], ...]
Overrides = Mapping[str, Answer]  # by name in the plan, or glob

_FLAT = LeaveAlone("flat: one vector holds all weights, so the fan-in is not visible")
_DENSE_KINDS = (
    *("clipped_linear", "dish", "gelu", "hard_swish", "hard_swish_mobilenet", "linear", "mish"),
    *("multisoftmax", "relu", "sigmoid", "softmax", "swish"),
)
_DENSE: Mapping[str, Answer] = {"W": "oi", "b": BIAS}

_LAYERS: Mapping[str, Mapping[str, Answer]] = {
    **{f"thinc.layers.{kind}.forward": _DENSE for kind in _DENSE_KINDS},
    # (nO, nP, nI): each of the nP pieces is a unit, and the layer takes the largest.
    "thinc.layers.maxout.forward": {"W": "ooi", "b": BIAS},
    # One unit, which gives each input vector a score.
    "thinc.layers.parametricattention.forward": {"Q": "i"},
    "thinc.layers.parametricattention_v2.forward": {"Q": "i"},
    "thinc.layers.cauchysimilarity.forward": {"W": LeaveAlone("scale of each dimension")},
    "thinc.layers.embed.forward": {"E": EMBEDDING},
    "thinc.layers.hashembed.forward": {"E": EMBEDDING},
    "thinc.layers.layernorm.forward": {"G": NORM, "b": BIAS},
    "thinc.layers.lstm.forward": {"LSTM": _FLAT, "HC0": LeaveAlone("initial state")},
    "thinc.layers.sparselinear.forward": {"W": _FLAT, "b": BIAS},
    "spacy.ml.character_embed.forward": {"E": EMBEDDING},
    "spacy.ml.staticvectors.forward": {"W": "oi"},
    # (nF, nO, nP, nI): a unit of the parser adds up its nF features.
    "spacy.ml._precomputable_affine.forward": {
        "W": "iooi",
        "b": BIAS,
        "pad": LeaveAlone("stands for a missing feature"),
    },
}


class _ByForward(Rules[Answer]):
    """Rules by forward function: all layers have one type, and their names are free text."""

    kind = "the forward function of a layer"

    def is_kind(self, kind: object) -> bool:
        return callable(kind) and not isinstance(kind, Model)  # which is callable

    def kinds_of(self, layer: Any) -> Sequence[Any]:
        return (attrgetter("_func")(layer),)


RULES = _ByForward(_LAYERS, group="gcx.thinc.layers")
register_layer: Register = RULES.register


def plan(*models: Model[Any, Any], overrides: Overrides | None = None) -> Plan:
    """Show which parameters of models would be centralized, over which axes, and why.

    The plan has one row per parameter, and one for each wrapped model of another framework.

    Parameters
    ----------
    *models : thinc.model.Model
        Initialized models. The layer that owns a parameter decides, never its rank.
    overrides : mapping from str to Layout, str, LeaveAlone or None, optional
        Answers that take precedence over the rules, by name in the plan (``"0.maxout.W"``) or glob
        (``"*.softmax.*"``); the first key that matches counts.

    Raises
    ------
    TypeError, ValueError
        If a model is not a thinc model or not initialized, or `overrides` does not fit.

    Examples
    --------
    >>> from thinc.api import Maxout, Softmax, chain
    >>> import gcx.thinc
    >>> model = chain(Maxout(nO=8, nI=4, nP=3), Softmax(nO=2, nI=8)).initialize()
    >>> print(gcx.thinc.plan(model))
    parameter    shape  layout  reason
    0.maxout.W   8x3x4  ooi     maxout
    0.maxout.b   8x3    -       bias
    1.softmax.W  2x8    oi      softmax
    1.softmax.b  2      -       bias
    2 of 4 parameters centralized
    """
    return Plan(decide(models, Options(overrides=overrides).overrides).values())


def decide(models: Models, overrides: Overrides | None) -> dict[Key, PlanRow]:
    if not models or not all(isinstance(model, Model) for model in models):
        kinds = ", ".join(describe(model, "thinc") for model in models) or "none"
        raise TypeError(f"give one or more thinc models; given: {kinds}")
    layers = list(walk(models))
    names = [f"{path}.{name}" for path, layer in layers for name in layer.param_names]
    given = find_overrides(overrides or {}, names)
    decided: dict[Key, PlanRow] = {}
    for path, layer in layers:
        for name in layer.param_names:
            whole = f"{path}.{name}"
            if not layer.has_param(name):
                raise ValueError(f"{whole} has no value yet: call model.initialize(X, Y) first")
            unknown = LeaveAlone(f"{UNDECLARED} {layer.name}.{name}")
            answer, _ = RULES.find(layer, name) or (unknown, "")
            rule = layer.name
            if whole in given:
                answer, rule = given[whole], "override"
            decided[layer.id, name] = decide_row(whole, layer.get_param(name).shape, answer, rule)
        for shim in layer.shims:
            kind = type(shim).__name__
            reason = "a model of another framework, whose layers thinc cannot see"
            decided[layer.id, kind] = PlanRow(f"{path}.{kind}", (), None, reason)
    return decided


def walk(models: Models) -> Iterator[tuple[str, Model[Any, Any]]]:
    """Yield each layer once, with its positions in the layers around it and its name."""
    seen: set[int] = set()
    rest = [(f"{k}." if len(models) > 1 else "", model) for k, model in enumerate(models)]
    while rest:
        place, layer = rest.pop(0)
        if layer.id not in seen:
            seen.add(layer.id)
            yield f"{place}{layer.name}", layer
            rest = [(f"{place}{k}.", child) for k, child in enumerate(layer.layers)] + rest


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
        self._how: Any = {"strength": options.strength, "reproducible": options.reproducible}
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
    (kind,) = type(optimizer).__bases__
    remedy = "call gcx.thinc.centralize for the copy and the models that it trains"
    msg = f"the copy of this {kind.__name__} does not centralize: {remedy}"
    warnings.warn(msg, UserWarning, stacklevel=2)
    return object.__new__, (kind,), optimizer.__getstate__()
