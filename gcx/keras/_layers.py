"""Rules for the variables of each type of layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keras import layers

from gcx._einsum import kernel_letters
from gcx._rules import BIAS, EMBEDDING, NORM, SLOPE, Answer, Rule, Rules, RuleT
from gcx.plan import LeaveAlone

Answers = Mapping[str, Answer]

_SCALE = LeaveAlone("scale of attention scores")


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
_TRANSPOSED: Answers = {"kernel": "...oi", "bias": BIAS}
# (window..., channels, multiplier): an output channel sees one input channel.
_DEPTHWISE: Answers = {"kernel": "...oo", "bias": BIAS}
_SEPARABLE: Answers = {"depthwise_kernel": "...oo", "pointwise_kernel": "...o", "bias": BIAS}
# The last axis holds the units of all gates.
_RECURRENT: Answers = {"kernel": "...o", "recurrent_kernel": "...o", "bias": BIAS}
_NORM: Answers = {"gamma": NORM, "scale": NORM, "beta": BIAS}
_SCORE: Answers = {"scale": _SCALE, "concat_score_weight": _SCALE}

_TRANSPOSED_LAYERS = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE_LAYERS = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE_LAYERS = (layers.SeparableConv1D, layers.SeparableConv2D)
_CONVOLUTIONS = (
    *(layers.Conv1D, layers.Conv2D, layers.Conv3D),
    *(*_TRANSPOSED_LAYERS, *_DEPTHWISE_LAYERS, *_SEPARABLE_LAYERS),
)
_NORMS = [getattr(layers, f"{kind}Normalization") for kind in ("Batch", "Group", "Layer", "RMS")]

_KERAS_LAYERS: Mapping[type | str, Rule[Answer]] = {
    layers.EinsumDense: _einsum,
    layers.PReLU: {"alpha": SLOPE},
    **dict.fromkeys((layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D), _KERNEL),
    **dict.fromkeys(_TRANSPOSED_LAYERS, _TRANSPOSED),
    **dict.fromkeys(_DEPTHWISE_LAYERS, _DEPTHWISE),
    **dict.fromkeys(_SEPARABLE_LAYERS, _SEPARABLE),
    **dict.fromkeys((layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell), _RECURRENT),
    "keras.*.ConvLSTMCell": _RECURRENT,  # Keras does not export it
    layers.Embedding: {"*embeddings*": EMBEDDING},
    "keras.*.ReversibleEmbedding": {"reverse_embeddings": "io"},  # (in, vocabulary): a head
    **dict.fromkeys(_NORMS, _NORM),
    **dict.fromkeys((layers.Attention, layers.AdditiveAttention), _SCORE),
}

RULES: Rules[Answer] = Rules(_KERAS_LAYERS, group="gcx.keras.layers")


def is_convolution(layer: Any) -> bool:
    return isinstance(layer, _CONVOLUTIONS) or type(layer).__name__ == "ConvLSTMCell"


def register_layer(kind: type) -> Callable[[RuleT], RuleT]:
    """Declare the variables of a layer type, for `plan` and `centralize`.

    Parameters
    ----------
    kind : type
        The class of the layer; subclasses without a rule follow.

    Returns
    -------
    callable
        Decorator for a rule: a mapping from names of the layer's own variables, or globs, to
        layouts, `gcx.plan.LeaveAlone` or None; or a function of a layer that returns one. Entry
        points, of the group ``gcx.keras.layers``, are as in `gcx.torch.register_layer`.

    Raises
    ------
    TypeError
        If `kind` is not a class, or the rule neither a mapping nor a function.

    Examples
    --------
    >>> import keras
    >>> import gcx.keras
    >>> class OutputFirst(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.weight = self.add_weight(shape=(3, shape[-1]), name="weight")
    >>> @gcx.keras.register_layer(OutputFirst)
    ... def output_first(layer):
    ...     return {"weight": "oi"}
    >>> layer = OutputFirst(name="head")
    >>> layer.build((None, 4))
    >>> gcx.keras.plan(layer)["head/weight"].layout
    Layout('oi')
    """
    return RULES.register(kind)
