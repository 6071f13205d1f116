"""Gradient Centralization for the optimizers of thinc, which spaCy trains with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Literal

from thinc.api import Model, Optimizer
from thinc.backends import get_array_ops

import gcx
from gcx._dispatch import backend_for
from gcx._names import match, naming
from gcx._rows import row
from gcx._rules import BIAS, EMBEDDING, NORM, Answer, Rule, RuleT, ask
from gcx.backends import _canonical
from gcx.layout import Layout
from gcx.plan import LeaveAlone, Plan, PlanRow

__all__ = ["GradientCentralization", "centralize", "plan", "register_layer"]

Where = Literal["gradient", "update"]

# How thinc names a parameter to an optimizer: by the id of its layer and its own name.
Key = tuple[int, str]

_FLAT = LeaveAlone("flat: all weights in one vector, in which no fan-in is to be seen")
_DENSE: Mapping[str, Answer] = {"W": "oi", "b": BIAS}

# All layers are of one type, and names are for people: what a layer is, its forward function says.
_LAYERS: Mapping[str, Mapping[str, Answer]] = {
    "thinc.layers.clipped_linear.forward": _DENSE,
    "thinc.layers.dish.forward": _DENSE,
    "thinc.layers.gelu.forward": _DENSE,
    "thinc.layers.hard_swish.forward": _DENSE,
    "thinc.layers.hard_swish_mobilenet.forward": _DENSE,
    "thinc.layers.linear.forward": _DENSE,
    "thinc.layers.mish.forward": _DENSE,
    "thinc.layers.multisoftmax.forward": _DENSE,
    "thinc.layers.relu.forward": _DENSE,
    "thinc.layers.sigmoid.forward": _DENSE,
    "thinc.layers.softmax.forward": _DENSE,
    "thinc.layers.swish.forward": _DENSE,
    # (nO, nP, nI): each of the nP pieces is a unit of its own, of which the largest is taken.
    "thinc.layers.maxout.forward": {"W": "ooi", "b": BIAS},
    # One score for each input vector: a unit with as many inputs as the vector is wide.
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

_registered: dict[Callable[..., Any], Rule[Answer]] = {}

_forward_of = attrgetter("_func")


def register_layer(forward: Callable[..., Any]) -> Callable[[RuleT], RuleT]:
    """Tell what the parameters of a layer are, for `plan` and `centralize`.

    Parameters
    ----------
    forward : callable
        The forward function of the layer, by which it is known.

    Returns
    -------
    callable
        A decorator for the rule: a function of a layer that returns, by name or glob of the
        layer's own parameters, a layout (``"oi"``), `gcx.plan.LeaveAlone` with the reason, or
        None. The first name that matches counts, and what none matches is left alone as unknown.

    Raises
    ------
    TypeError
        If `forward` is not a function, or is a model; if the rule is not a function.

    Examples
    --------
    >>> from thinc.api import Model
    >>> import gcx.thinc
    >>> def forward(model, X, is_train): ...
    >>> @gcx.thinc.register_layer(forward)
    ... def input_first(layer):
    ...     return {"kernel": "io"}
    >>> layer = Model("mine", forward, params={"kernel": None})
    >>> layer.set_param("kernel", layer.ops.alloc2f(4, 3))
    >>> print(gcx.thinc.plan(layer))
    parameter    shape  layout  reason
    mine.kernel  4x3    io      mine
    1 of 1 parameters centralized
    """
    if isinstance(forward, Model):  # which is callable
        msg = f"register_layer takes no model, such as {forward.name!r}: give its forward function"
        raise TypeError(msg)
    if not callable(forward):
        msg = f"register_layer takes the forward function of a layer, not {forward!r}"
        raise TypeError(msg)

    def decorator(rule: RuleT) -> RuleT:
        if not callable(rule):
            msg = f"the rule of {_qualified(forward)} is a function of a layer, not {rule!r}"
            raise TypeError(msg)
        _registered[forward] = rule
        return rule

    return decorator


def plan(*models: Model[Any, Any]) -> Plan:
    """Show what would be centralized in models, over which axes, and what is left alone and why.

    Parameters
    ----------
    *models : thinc.model.Model
        Models that are initialized. Their parameters are judged by the layer that owns them, never
        by their rank; a layer that nobody declared is left alone, and says so.

    Returns
    -------
    gcx.plan.Plan
        One row per parameter, and one for each model of another framework that is wrapped.

    Raises
    ------
    TypeError
        If there is no model, or something else.
    ValueError
        If a model is not initialized.

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
    return Plan(_decide(models).values())


def centralize(
    optimizer: Optimizer,
    *models: Model[Any, Any],
    where: Where = "gradient",
    reproducible: bool = False,
) -> GradientCentralization:
    r"""Let an optimizer use Gradient Centralization from its next step on.

    Parameters
    ----------
    optimizer : thinc.optimizers.Optimizer
        It goes on being used as before, by ``model.finish_update`` and by spaCy.
    *models : thinc.model.Model
        All the models that the optimizer trains (in spaCy, those of the components), initialized.
        An optimizer of thinc sees arrays and keys; what a weight is, its layer knows.
    where : {"gradient", "update"}, optional
        ``"gradient"`` centralizes what the optimizer uses as the gradient, in place.
        ``"update"`` centralizes the displacement of the weights by the step, which the authors
        advise for adaptive optimizers such as Adam and RAdam; it keeps the mean of each weight
        over its fan-in constant with all of them, and holds for the moving averages too.
    reproducible : bool, optional
        Whether means are taken in the one order that gives equal bits everywhere (see
        :doc:`/reproducible`), on NumPy and on CuPy.

    Returns
    -------
    GradientCentralization
        A handle: ``.plan`` shows what is centralized and why, ``.remove()`` ends it.

    Raises
    ------
    TypeError
        If `optimizer` is not an optimizer of thinc; if `reproducible` cannot be promised for the
        dtype of a weight; or as `plan`.
    ValueError
        If the optimizer already has Gradient Centralization, nothing would be centralized, or a
        model is not initialized.
    RuntimeError
        In a step: if the parameter is not of these models.

    Warns
    -----
    UserWarning
        If the optimizer is copied or pickled: its copy does not centralize.

    See Also
    --------
    plan : what would be centralized.
    gcx.centralize : the operator, for one gradient.

    Notes
    -----
    ``L2`` with ``L2_is_weight_decay=False`` is added to the gradient, and projected with it, as the
    authors do. With ``L2_is_weight_decay=True`` it is applied to the weights: outside of
    ``where="gradient"``, inside ``where="update"``. Clipping (``grad_clip``) scales the whole
    gradient of a parameter after that, which leaves its mean at zero.

    With ``where="gradient"``, SGD without weight decay keeps the mean of each weight where it was
    (corollary 4.1); Adam and RAdam, which divide the gradient element by element, do not.

    References
    ----------
    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, algorithms 1 and 2. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import numpy as np
    >>> from thinc.api import SGD, Linear
    >>> import gcx.thinc
    >>> model = Linear(nO=2, nI=3).initialize()
    >>> optimizer = SGD(0.1)
    >>> gcx.thinc.centralize(optimizer, model)
    <GradientCentralization, where='gradient', <gcx plan: 1 of 2 parameters centralized>>
    >>> start = model.get_param("W").mean(1)
    >>> for _ in range(10):
    ...     y, backprop = model.begin_update(np.ones((4, 3), dtype="float32"))
    ...     _ = backprop(y - 1)
    ...     model.finish_update(optimizer)
    >>> np.allclose(model.get_param("W").mean(1), start)
    True
    """
    if where not in ("gradient", "update"):
        msg = f"where is 'gradient' or 'update', not {where!r}"
        raise ValueError(msg)
    if not isinstance(optimizer, Optimizer):
        msg = f"optimizer is a thinc.api.Optimizer, not a {type(optimizer).__name__}"
        raise TypeError(msg)
    if hasattr(optimizer, "gradient_centralization"):
        msg = "this optimizer has Gradient Centralization already; .remove() that handle first"
        raise ValueError(msg)
    expected = plan(*models)
    if not any(found.layout for found in expected):
        msg = f"there is nothing to centralize in these models:\n{expected}"
        raise ValueError(msg)
    return GradientCentralization(optimizer, *models, where=where, reproducible=reproducible)


class GradientCentralization:
    """Gradient Centralization at work in an optimizer, as `gcx.thinc.centralize` returns it.

    Examples
    --------
    >>> from thinc.api import Adam, Linear
    >>> import gcx.thinc
    >>> optimizer = Adam()
    >>> handle = gcx.thinc.centralize(optimizer, Linear(nO=2, nI=3).initialize(), where="update")
    >>> print(handle.plan)
    parameter  shape  layout  reason
    linear.W   2x3    oi      linear
    linear.b   2      -       bias
    1 of 2 parameters centralized
    >>> handle.remove()
    """

    def __init__(
        self, optimizer: Any, *models: Model[Any, Any], where: Where, reproducible: bool
    ) -> None:
        self._models = models
        self._optimizer = optimizer
        self._kind = kind = type(optimizer)
        self._rows = _decide(models)
        self._reproducible = reproducible
        if reproducible:
            _check_reproducible(models, self._rows)
        self._foreign: set[Key] = set()  # parameters of shims
        self._step = self._update_step if where == "update" else self._gradient_step
        self._where = where

        def call(optimizer: Any, key: Key, *args: Any, **options: Any) -> Any:
            layout = self._layout_of(key)
            if layout is None:
                return kind.__call__(optimizer, key, *args, **options)
            return self._step(layout, optimizer, key, *args, **options)

        # Calls look for __call__ in the class, and an object can only take on a class without room
        # for more attributes than it has: hence slots, and a class for each optimizer.
        own = {
            "__slots__": (),
            "__call__": call,
            "__reduce_ex__": _reduce_to_plain,
            "gradient_centralization": self,
        }
        optimizer.__class__ = type(f"Centralized{kind.__name__}", (kind,), own)

    @property
    def plan(self) -> Plan:
        """What happens to each parameter of the models, and why, as a `gcx.plan.Plan`."""
        return Plan(self._rows.values())

    def remove(self) -> None:
        """Leave the optimizer as it was before; a second time does nothing."""
        if getattr(self._optimizer, "gradient_centralization", None) is self:
            self._optimizer.__class__ = self._kind

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, where={self._where!r}, {self.plan!r}>"

    def _gradient_step(
        self, layout: Layout, optimizer: Any, key: Key, weights: Any, gradient: Any, **options: Any
    ) -> Any:
        gradient = gcx.centralize(
            gradient, layout=layout, out=gradient, reproducible=self._reproducible
        )
        if not optimizer.L2_is_weight_decay:
            # The optimizer is going to add L2 * weights.
            gradient -= _l2(optimizer, key) * self._mean(weights, layout)
        return self._kind.__call__(optimizer, key, weights, gradient, **options)

    def _update_step(
        self, layout: Layout, optimizer: Any, key: Key, weights: Any, gradient: Any, **options: Any
    ) -> Any:
        mean = self._mean(weights, layout)
        # The averages are to be those of the weights as they are at the end.
        averages, optimizer.averages = optimizer.averages, None
        try:
            weights, gradient = self._kind.__call__(optimizer, key, weights, gradient, **options)
        finally:
            optimizer.averages = averages
        weights -= self._mean(weights, layout) - mean
        if averages is not None:
            ops = get_array_ops(weights)  # type: ignore[no-untyped-call]
            if key not in averages:
                averages[key] = ops.alloc(weights.shape, dtype="float32")
            ops.update_averages(averages[key], weights, optimizer.nr_update[key])
        return weights, gradient

    def _mean(self, x: Any, layout: Layout) -> Any:
        axes = layout.fan_in_axes(x.ndim)
        if self._reproducible:
            return _canonical.fan_in_mean(x, axes, get_array_ops(x).xp)  # type: ignore[no-untyped-call]
        return x.mean(axis=axes, keepdims=True)

    def _layout_of(self, key: Key) -> Layout | None:
        if key in self._foreign:
            return None
        if key not in self._rows:
            self._rows = _decide(self._models)  # layers may have been added, or replaced
        if key in self._rows:
            return self._rows[key].layout
        # Only now: layers and shims are counted apart, and a new layer may have the id of a shim.
        if key[0] in {shim.id for _, layer in _walk(self._models) for shim in layer.shims}:
            self._foreign.add(key)
            return None
        msg = (
            f"the optimizer is to train {key[1]!r} of a layer that is not in the models given to "
            "gcx.thinc.centralize; give it all of them: centralize(optimizer, *models)"
        )
        raise RuntimeError(msg)


def _reduce_to_plain(optimizer: Any, _protocol: int) -> Any:
    """Copy or pickle a centralized optimizer as the plain one that it was, and warn of it."""
    centralized = type(optimizer)
    (kind,) = centralized.__bases__
    warnings.warn(
        f"the copy of this {kind.__name__} does not centralize: call gcx.thinc.centralize for the "
        "copy and the models that it trains",
        UserWarning,
        stacklevel=2,
    )
    optimizer.__class__ = kind
    try:
        plain = copy.copy(optimizer)
    finally:
        optimizer.__class__ = centralized
    # Pickle takes no plain object in the place of this one; a call that gives one it does.
    return copy.copy, (plain,)


def _check_reproducible(models: tuple[Model[Any, Any], ...], rows: Mapping[Key, PlanRow]) -> None:
    for _, layer in _walk(models):
        for name in layer.param_names:
            row = rows[layer.id, name]
            if row.layout is not None:
                weight = layer.get_param(name)
                with naming(row.name):
                    axes = row.layout.fan_in_axes(weight.ndim)
                    backend_for(weight).check_reproducible(weight, axes)


def _decide(models: tuple[Model[Any, Any], ...]) -> dict[Key, PlanRow]:
    """Settle what happens to each parameter of models."""
    if not models or not all(isinstance(model, Model) for model in models):
        given = ", ".join(type(model).__name__ for model in models) or "none"
        msg = f"give one or more models of thinc; given: {given}"
        raise TypeError(msg)
    decided: dict[Key, PlanRow] = {}
    for path, layer in _walk(models):
        for name in layer.param_names:
            if not layer.has_param(name):
                msg = f"{path}.{name} has no value yet: call model.initialize(X, Y) first"
                raise ValueError(msg)
            shape = layer.get_param(name).shape
            decided[layer.id, name] = row(f"{path}.{name}", shape, *_answer(layer, name))
        for shim in layer.shims:
            kind = type(shim).__name__
            reason = "of another framework, whose layers thinc cannot see"
            decided[layer.id, kind] = PlanRow(f"{path}.{kind}", (), None, reason)
    return decided


def _walk(models: tuple[Model[Any, Any], ...]) -> Iterator[tuple[str, Model[Any, Any]]]:
    """List each layer once, with its name behind its place among the layers."""
    seen: set[int] = set()

    def below(layer: Model[Any, Any], place: str) -> Iterator[tuple[str, Model[Any, Any]]]:
        if layer.id not in seen:
            seen.add(layer.id)
            yield f"{place}{layer.name}", layer
            for position, child in enumerate(layer.layers):
                yield from below(child, f"{place}{position}.")

    for position, model in enumerate(models):
        yield from below(model, f"{position}." if len(models) > 1 else "")


def _answer(layer: Model[Any, Any], name: str) -> tuple[Answer, str]:
    """Ask the rule of a layer about its parameter `name`; the second is the name of the layer."""
    answers = _answers(layer)
    keys = match(answers, [name])
    if name in keys:
        return answers[keys[name]], layer.name
    return LeaveAlone(f"unknown: nobody declared {layer.name}.{name}"), layer.name


def _answers(layer: Model[Any, Any]) -> Mapping[str, Answer]:
    forward = _forward_of(layer)
    if forward not in _registered:
        return _LAYERS.get(_qualified(forward), {})
    return ask(_registered[forward], layer, layer.name)


def _qualified(function: Callable[..., Any]) -> str:
    # Callables need not have names.
    return f"{function.__module__}.{getattr(function, '__qualname__', '')}"


def _l2(optimizer: Any, key: Key) -> float:
    rate = optimizer.L2  # a number in thinc 8, a schedule in thinc 9
    if callable(rate):
        rate = rate(optimizer.step, key=key, last_score=optimizer.last_score)
    return float(rate)
