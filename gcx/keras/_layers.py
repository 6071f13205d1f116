"""What each type of layer says about its variables: where the fan-in is, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keras import layers

from gcx._rules import BIAS, EMBEDDING, NORM, Answer, Rule, Rules, RuleT
from gcx.plan import LeaveAlone

_SCALE = LeaveAlone("scale of attention scores")


def _kernel(_: Any) -> Mapping[str, Answer]:
    # (in, out), or (window..., in / groups, out). The product of the LoRA factors (..., rank) and
    # (rank, out) is added to the kernel: two layers, one after the other.
    return {"kernel": "...o", "bias": BIAS, "lora_kernel_a": "...o", "lora_kernel_b": "io"}


def _transposed_convolution(_: Any) -> Mapping[str, Answer]:
    return {"kernel": "...oi", "bias": BIAS}


def _depthwise_convolution(_: Any) -> Mapping[str, Answer]:
    # (window..., channels, multiplier): an output channel sees one input channel alone.
    return {"kernel": "...oo", "bias": BIAS}


def _separable_convolution(_: Any) -> Mapping[str, Answer]:
    return {"depthwise_kernel": "...oo", "pointwise_kernel": "...o", "bias": BIAS}


def _einsum(layer: Any) -> Mapping[str, Answer]:
    operands, output = layer.equation.split("->")
    kernel = operands.split(",")[1]
    letters = "".join("o" if axis in output else "i" for axis in kernel)
    if "i" not in letters:
        return {"*": LeaveAlone("product element by element: there is no fan-in")}
    # The second LoRA factor (rank, last axis of the kernel) is on the side of that axis.
    second_factor = "io" if letters[-1] == "o" else "oi"
    return {
        "kernel": letters,
        "bias": BIAS,
        "lora_kernel_a": letters,
        "lora_kernel_b": second_factor,
    }


def _recurrent(_: Any) -> Mapping[str, Answer]:
    # The gates side by side on the last axis, each with its own units.
    return {"kernel": "...o", "recurrent_kernel": "...o", "bias": BIAS}


def _embedding(_: Any) -> Mapping[str, Answer]:
    return {"*embeddings*": EMBEDDING}


def _norm(_: Any) -> Mapping[str, Answer]:
    return {"gamma": NORM, "scale": NORM, "beta": BIAS}


def _activation(_: Any) -> Mapping[str, Answer]:
    return {"alpha": LeaveAlone("slope of an activation")}


def _score(_: Any) -> Mapping[str, Answer]:
    return {"scale": _SCALE, "concat_score_weight": _SCALE}


_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_NORMS = (
    layers.BatchNormalization,
    layers.GroupNormalization,
    layers.LayerNormalization,
    layers.RMSNormalization,
)

_KERAS_LAYERS: Mapping[type | str, Rule[Answer]] = {
    layers.EinsumDense: _einsum,
    layers.PReLU: _activation,
    **dict.fromkeys((layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D), _kernel),
    **dict.fromkeys(_TRANSPOSED, _transposed_convolution),
    **dict.fromkeys((layers.DepthwiseConv1D, layers.DepthwiseConv2D), _depthwise_convolution),
    **dict.fromkeys((layers.SeparableConv1D, layers.SeparableConv2D), _separable_convolution),
    **dict.fromkeys((layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell), _recurrent),
    "keras.*.ConvLSTMCell": _recurrent,  # not exported, as its layers ConvLSTM1D to 3D are
    layers.Embedding: _embedding,
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys((layers.Attention, layers.AdditiveAttention), _score),
}

RULES: Rules[Answer] = Rules(_KERAS_LAYERS, group="gcx.keras.layers")


def register_layer(kind: type) -> Callable[[RuleT], RuleT]:
    """Tell what the variables of a layer type are, for `plan` and `centralize`.

    Parameters
    ----------
    kind : type
        The class of the layer. Its subclasses follow the rule, unless they have their own.

    Returns
    -------
    callable
        A decorator for the rule: a function of a layer that returns, by name or glob of the
        layer's own variables (not those of its sublayers), a layout (``"...o"``, ``"io"``),
        `gcx.plan.LeaveAlone` with the reason, or None. The first name that matches counts, and
        what none matches is left alone as unknown.

    Raises
    ------
    TypeError
        If `kind` is not a class.

    Notes
    -----
    A package can bring its rules without importing gcx, by an entry point of the group
    ``gcx.keras.layers``, whose name is the qualified name of the layer::

        [project.entry-points."gcx.keras.layers"]
        "mypackage.layers.OutputFirst" = "mypackage.gcx_rules:output_first"

    Examples
    --------
    >>> import keras
    >>> import gcx.keras
    >>> class OutputFirst(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.weight = self.add_weight(shape=(3, shape[-1]), name="weight")
    ...     def call(self, inputs):
    ...         return keras.ops.matmul(inputs, keras.ops.transpose(self.weight))
    >>> @gcx.keras.register_layer(OutputFirst)
    ... def output_first(layer):
    ...     return {"weight": "oi"}
    >>> layer = OutputFirst(name="head")
    >>> layer.build((None, 4))
    >>> print(gcx.keras.plan(layer))
    parameter    shape  layout  reason
    head/weight  3x4    oi      OutputFirst
    1 of 1 parameters centralized
    """
    return RULES.register(kind)
