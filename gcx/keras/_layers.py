"""Rules for the variables of each type of layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcx._rules import BIAS, EMBEDDING, NORM, SLOPE, Answer, Rule, Rules, kernel_letters
from gcx.plan import LeaveAlone

Answers = Mapping[str, Answer]


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
register_layer = RULES.register


def is_convolution(layer: Any) -> bool:
    bases = type(layer).__mro__
    return any("Conv" in base.__name__ and base.__module__.startswith("keras.") for base in bases)
