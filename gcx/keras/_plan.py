"""Rules for the variables of each type of layer, and the plan of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import keras

from gcx._decisions import decide_row, find_overrides, merge
from gcx._frameworks import describe
from gcx._options import Layers, Options
from gcx._rules import (
    BIAS,
    EMBEDDING,
    NORM,
    NOT_CONVOLUTION,
    SLOPE,
    Answer,
    Register,
    Rule,
    Rules,
    kernel_letters,
)
from gcx.plan import LeaveAlone, Plan, PlanRow

Answers = Mapping[str, Answer]
Overrides = Answers  # by path of the variable, or glob


def _einsum(layer: Any) -> Answers:
    letters = kernel_letters(layer.equation)
    if "i" not in letters:
        return {"*": LeaveAlone("product element by element: there is no fan-in")}
    # The LoRA factors are (..., rank) and (rank, last axis of the kernel).
    is_summed = letters[-1] == "i"
    return {
        "kernel": letters,
        "bias": BIAS,
        "lora_kernel_a": letters[:-1] + ("i" if is_summed else "o"),
        "lora_kernel_b": "oi" if is_summed else "io",
    }


# (in, out), or (window..., in / groups, out). The product of the LoRA factors (..., rank) and
# (rank, out) is added to the kernel: two layers, one after the other.
_KERNEL: Answers = {"kernel": "...o", "bias": BIAS, "lora_kernel_a": "...o", "lora_kernel_b": "io"}
# The last axis holds the units of all gates.
_RECURRENT: Answers = {"kernel": "...o", "recurrent_kernel": "...o", "bias": BIAS}
_SCALE = LeaveAlone("scale of attention scores")

_KERAS_LAYERS: Mapping[str, Rule[Answer]] = {
    "Dense": _KERNEL,
    "EinsumDense": _einsum,
    "Conv?D": _KERNEL,
    "Conv?DTranspose": {"kernel": "...oi", "bias": BIAS},
    # (window..., channels, multiplier): an output channel sees one input channel.
    "DepthwiseConv?D": {"kernel": "...oo", "bias": BIAS},
    "SeparableConv?D": {"depthwise_kernel": "...oo", "pointwise_kernel": "...o", "bias": BIAS},
    **dict.fromkeys(("SimpleRNNCell", "LSTMCell", "GRUCell", "ConvLSTMCell"), _RECURRENT),
    "Embedding": {"*embeddings*": EMBEDDING},
    "ReversibleEmbedding": {"reverse_embeddings": "io"},  # (in, vocabulary): a head
    "*Normalization": {"gamma": NORM, "scale": NORM, "beta": BIAS},
    "PReLU": {"alpha": SLOPE},
    "*Attention": {"scale": _SCALE, "concat_score_weight": _SCALE},
}

RULES: Rules[Answer] = Rules(
    {f"keras.*.{kind}": rule for kind, rule in _KERAS_LAYERS.items()}, group="gcx.keras.layers"
)
register_layer: Register = RULES.register


def is_convolution(layer: Any) -> bool:
    bases = type(layer).__mro__
    return any("Conv" in base.__name__ and base.__module__.startswith("keras.") for base in bases)


def plan(model: Any, *, layers: Layers = "all", overrides: Overrides | None = None) -> Plan:
    """Show which variables of a model would be centralized, over which axes, and why.

    The plan has one row per trainable variable.

    Parameters
    ----------
    model : keras.Model or keras.Layer
        A built model. The layer that owns a variable decides, never its rank.
    layers : {"all", "conv"}, optional
        ``"conv"`` is the paper's variant for convolutions alone.
    overrides : mapping from str to Layout, str, LeaveAlone or None, optional
        Answers that take precedence over the rules, by path (``"sequential/dense/kernel"``) or glob
        (``"*/head/*"``); the first key that matches counts.

    Raises
    ------
    TypeError, ValueError
        If `model` is not a layer or not built, or an option does not fit.

    Examples
    --------
    >>> import keras
    >>> import gcx.keras
    >>> conv = keras.layers.SeparableConv2D(4, 3, name="conv")
    >>> print(gcx.keras.plan(keras.Sequential([keras.Input((8, 8, 1)), conv], name="net")))
    parameter                  shape    layout  reason
    net/conv/depthwise_kernel  3x3x1x1  ...oo   SeparableConv2D
    net/conv/pointwise_kernel  1x1x1x4  -       fan-in 1: subtracting its mean would freeze it
    net/conv/bias              4        -       bias
    1 of 3 parameters centralized
    """
    decided = decide(model, Options(layers=layers, overrides=overrides))
    return Plan(decided[id(variable)] for variable in model.trainable_variables)


def decide(model: Any, options: Options) -> dict[int, PlanRow]:
    """Make the row of each variable, by the `id` of the variable."""
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model is a keras.Model or a keras.Layer, not {describe(model, 'keras')}")
    if not model.built:
        raise ValueError(
            f"{model.name} has no variables yet: build it first, with keras.Input as its first "
            "layer, by model.build(input_shape), or by a call on some data"
        )
    owned = list(_owned_variables(model))
    given = find_overrides(options.overrides or {}, [variable.path for _, variable in owned])
    decided: dict[int, PlanRow] = {}
    for layer, variable in owned:
        answer, rule = RULES.answer(layer, variable.name)
        has_layout = not isinstance(answer, LeaveAlone | None)
        if has_layout and options.layers == "conv" and not is_convolution(layer):
            answer = NOT_CONVOLUTION
        if variable.path in given:
            answer, rule = given[variable.path], "override"
        new = decide_row(variable.path, tuple(variable.shape), answer, rule)
        decided[id(variable)] = merge([decided.get(id(variable), new), new])
    return decided


def _owned_variables(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each layer with its own variables; a tied variable comes with each of its layers."""
    for layer in attrgetter("_flatten_layers")(model)():
        # A wrapper, such as SpectralNormalization, may hold the variables of its layer as well.
        wrapped = layer.layer.variables if isinstance(layer, keras.layers.Wrapper) else ()
        # `layer.variables` includes the variables of sublayers, and does not tell the owner.
        for variable in vars(layer)["_trainable_variables"]:
            if all(variable is not other for other in wrapped):
                yield layer, variable
