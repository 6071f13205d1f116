"""The forms in which layouts may be given, read into one: a function of name and array."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType
from typing import Any

from gcx._names import match_all
from gcx._rules import Answer
from gcx.layout import Layout, LayoutLike, as_layout
from gcx.optax._models import decide, framework_of
from gcx.optax._models._decision import Decision
from gcx.optax._names import Names
from gcx.plan import LeaveAlone

# A preset, a mapping, a function, or a model of a framework that need not be installed.
Layouts = str | Mapping[str, Answer] | Callable[[str, Any], Answer] | object

# Name and array to layout (or None) and the reason for it.
NameRule = Callable[[str, Any], tuple[LayoutLike | None, str]]

# The names there are, to a rule.
Source = Callable[[Names], NameRule]

TOO_FEW_AXES = "rank below 2"

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
            "b...oi",
            "stack of transposed convolutions",
        ),
        (r"__layer_stack[^/]*/.*/(w|w_i|w_h)", "b...o", "stack of weights"),
        (r"conv[^/]*_transpose[^/]*/w", "...oi", "transposed convolution"),
        (r"/(w|w_i|w_h)", "...o", "weight"),
        (r"/embeddings", None, "embedding"),
        (r"/(b|offset)", None, "bias"),
        (r"/scale", None, "norm"),
    ),
    "equinox": (
        (r"embed[^/]*/weight", None, "embedding"),
        (r"norm[^/]*/weight", None, "norm"),
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
        (r"/(bias|beta)", None, "bias"),
        (r"/(gamma|scale)", None, "norm"),
    ),
}

_PRESET_NAMES = ", ".join(map(repr, PRESETS))


def layouts(
    model: object, /, *example_inputs: Any, **keyword_inputs: Any
) -> dict[str, Layout | LeaveAlone]:
    """Read off a model where the fan-in of each of its parameters is.

    Each parameter is judged by the type of the layer that owns it, never by its name or its rank. A
    subclass follows its base class. Where layers are stacked (``scan``, ``vmap``, ``layer_stack``),
    the axes of the stack are kept. A layer that nobody declared is left alone, and says so.

    Parameters
    ----------
    model : nnx.Module, linen.Module, equinox.Module or haiku.Transformed
        Of concrete arrays or of shapes (``nnx.eval_shape``, ``equinox.filter_eval_shape``).
    *example_inputs, **keyword_inputs
        For linen and Haiku what their ``init`` takes after the random key: arrays, or
        `jax.ShapeDtypeStruct`. The model is traced on their shapes; nothing is computed.

    Returns
    -------
    dict from str to Layout or LeaveAlone
        For `centralize` and `plan`; change in it what you know better. The names are those of the
        parameters as an optimizer gets them: of ``nnx.state(model, nnx.Param)``, of
        ``equinox.filter(model, equinox.is_array)``, of linen's ``variables["params"]`` (put
        ``"params/"`` in front if you optimize all of `variables`), and of Haiku's ``params``.

    Raises
    ------
    TypeError
        If `model` is not a model, or is given example inputs that it does not need.

    See Also
    --------
    register_layer : declare a layer of your own.

    Examples
    --------
    >>> import gcx.optax
    >>> gcx.optax.layouts("flax")
    Traceback (most recent call last):
        ...
    TypeError: model is an nnx, linen or Equinox module, or what haiku.transform has made, not str

    ``gcx.optax.layouts(model, jnp.zeros((1, 28, 28, 1)))`` of a linen model may give
    ``{"Conv_0/kernel": Layout("...o"), "Conv_0/bias": LeaveAlone("bias"), ...}``.
    """
    decisions = decide(model, example_inputs, keyword_inputs)
    return {name: layout or LeaveAlone(why) for name, (layout, why) in decisions.items()}


def source_of(layouts: Layouts) -> Source:
    """Read any form of `layouts`, once; errors on what is none."""
    if isinstance(layouts, str):
        if layouts not in PRESETS:
            msg = (
                f"layouts: no preset {layouts!r}; there are {_PRESET_NAMES}. "
                "To give every parameter one layout use a mapping: {'*': 'o...'}"
            )
            raise ValueError(msg)
        return _whatever_the_names(partial(_from_preset, layouts))
    # Before the other forms: a model may be callable, or a mapping.
    framework = framework_of(layouts)
    if framework is not None:
        if framework.needs_inputs:
            msg = (
                f"a model of {framework.module} has no layers before it sees an input: give "
                "gcx.optax.layouts(model, *example_inputs), where shapes will do"
            )
            raise TypeError(msg)
        return _whatever_the_names(partial(_from_model, decide(layouts)))
    if isinstance(layouts, type):
        name = layouts.__name__
        msg = f"layouts is the class {name}, which has no shapes: give a model, such as {name}(...)"
        raise TypeError(msg)
    if isinstance(layouts, Mapping):
        _check_answers(layouts)
        return partial(_mapping_rule, dict(layouts))
    if callable(layouts):
        return _whatever_the_names(partial(_from_function, layouts))
    msg = (
        f"layouts is an nnx or Equinox module, a mapping from path to layout or None, a function "
        f"of path and array, or a preset ({_PRESET_NAMES}), not {type(layouts).__name__}"
    )
    raise TypeError(msg)


def _whatever_the_names(rule: NameRule) -> Source:
    return lambda _names: rule


def _from_preset(preset: str, name: str, leaf: Any) -> tuple[LayoutLike | None, str]:
    for pattern, layout, reason in PRESETS[preset]:
        is_named_so = re.search(f"{pattern}$", f"/{name}")
        if is_named_so and (layout is None or _fits(layout, leaf.ndim)):
            return layout, reason
    return None, _no_rule(leaf)


def _from_model(
    decisions: Mapping[str, Decision], name: str, leaf: Any
) -> tuple[LayoutLike | None, str]:
    if name in decisions or leaf.ndim < 2:
        return decisions.get(name, (None, TOO_FEW_AXES))
    return None, "unknown: the model has no parameter of this name"


def _from_function(
    function: Callable[[str, Any], Answer], name: str, leaf: Any
) -> tuple[LayoutLike | None, str]:
    return _as_given(function(name, leaf))


def _check_answers(layouts: Mapping[str, Answer]) -> None:
    for path, answer in layouts.items():
        if not isinstance(answer, (str, Layout, LeaveAlone, NoneType)):
            msg = (
                f"layouts: {path!r} has a {type(answer).__name__}, where a mapping goes from the "
                "path of a parameter to a layout, LeaveAlone or None. Parameters alone do not tell "
                f"their fan-in: give the model, or a preset ({_PRESET_NAMES})"
            )
            raise TypeError(msg)


def _mapping_rule(layouts: Mapping[str, Answer], names: Names) -> NameRule:
    keys = match_all(layouts, names.visible, what="layouts", hidden=names.hidden)

    def rule(name: str, leaf: Any) -> tuple[LayoutLike | None, str]:
        return _as_given(layouts[keys[name]]) if name in keys else (None, _no_rule(leaf))

    return rule


def _as_given(answer: Answer) -> tuple[LayoutLike | None, str]:
    return (None, answer.reason) if isinstance(answer, LeaveAlone) else (answer, "as given")


def _no_rule(leaf: Any) -> str:
    return "unknown: no rule for this name" if leaf.ndim > 1 else TOO_FEW_AXES


def _fits(layout: str, ndim: int) -> bool:
    try:
        return bool(as_layout(layout).fan_in_axes(ndim))
    except ValueError:
        return False
