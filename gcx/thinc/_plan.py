"""The plan of a thinc model, by the forward functions of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from thinc.api import Model

from gcx._decisions import decide_row, find_overrides
from gcx._frameworks import describe
from gcx._options import Options
from gcx._rules import BIAS, EMBEDDING, NORM, UNDECLARED, Answer, Register, Rules
from gcx.plan import LeaveAlone, Plan, PlanRow

# The id of a layer and the name of its parameter, by which thinc's optimizers know a parameter.
Key = tuple[int, str]
Models = tuple[Model[Any, Any], ...]

# By name in the plan or glob; None and LeaveAlone leave alone.
Overrides = Mapping[str, Answer]

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
