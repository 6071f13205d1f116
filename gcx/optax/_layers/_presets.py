"""Layouts by the name of a parameter, for those who have the parameters and no model."""

from __future__ import annotations

_AMBIGUOUS = "unknown: its name does not tell the fan-in; the model does (gcx.optax.layouts)"

# The rows of a preset: how the path ends, layout or None, reason. The first row counts that matches
# and fits the rank. Patterns are regular expressions since the "*" of a glob crosses "/", and
# "conv_transpose_block/conv/w" is not a transposed convolution.
PRESETS: dict[str, tuple[tuple[str, str | None, str], ...]] = {
    "flax": (
        (r"(query|key|value)/kernel", "ioo", "attention projection"),
        # As flax names them by itself. Of a kernel of rank 2 there is no doubt, unless it is one of
        # several that are stacked.
        (r"(Scan|Vmap)[A-Z][^/]*/.*kernel", None, _AMBIGUOUS),
        (r"(DenseGeneral|Einsum)_[^/]*/kernel", "io", "kernel"),
        (r"(DenseGeneral|Einsum|ConvLocal)_[^/]*/kernel", None, _AMBIGUOUS),
        (r"/kernel", "...o", "kernel"),
        (r"/embedding", None, "embedding"),
        (r"/bias", None, "bias"),
        (r"/scale", None, "norm"),
    ),
    "haiku": (
        (
            r"__layer_stack[^/]*/.*conv[^/]*_transpose[^/]*/w",
            "o...oi",
            "stack of transposed convolutions",
        ),
        (r"__layer_stack[^/]*/.*/(w|w_i|w_h)", "o...o", "stack of weights"),
        (r"conv[^/]*_transpose[^/]*/w", "...oi", "transposed convolution"),
        (r"/(w|w_i|w_h)", "...o", "weight"),
        (r"/embeddings", None, "embedding"),
        (r"/b", None, "bias"),
        (r"/(scale|offset)", None, "norm"),
    ),
    "equinox": (
        (r"embed[^/]*/weight", None, "embedding"),
        (r"norm[^/]*/(weight|bias)", None, "norm"),
        (r"/(weight|weight_ih|weight_hh)", "o...", "weight"),
        (r"/(bias|bias_n)", None, "bias"),
    ),
    "keras": (
        (r"(query|key|value)/kernel", "ioo", "attention projection"),
        (r"conv[^/]*_transpose[^/]*/kernel", "...oi", "transposed convolution"),
        # The second and third name are those of keras.applications.
        (r"(depthwise|dwconv|conv_dw)[^/]*/kernel", "...oo", "depthwise convolution"),
        (r"/depthwise_kernel", "...oo", "depthwise convolution"),
        (r"einsum_dense[^/]*/kernel", "io", "kernel"),
        (r"einsum_dense[^/]*/kernel", None, _AMBIGUOUS),
        (r"/(kernel|pointwise_kernel|recurrent_kernel)", "...o", "kernel"),
        (r"/(embeddings|reverse_embeddings)", None, "embedding"),
        (r"/bias", None, "bias"),
        (r"/(gamma|beta|scale)", None, "norm"),
    ),
}
