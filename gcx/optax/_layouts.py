"""Every form of `layouts`, read into one function of name and array; it makes the plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import optax

from gcx._decisions import decide_row
from gcx._frameworks import hint_at_adapter, name_kind
from gcx._names import layouts_for, match_all
from gcx._rules import NO_RULE, Answer
from gcx.backends._jax import is_floating
from gcx.layout import LayoutLike, as_layout
from gcx.optax import _models
from gcx.optax._names import Names, named_leaves, names_of
from gcx.plan import LeaveAlone, Plan, PlanRow

# A preset, a plan, a mapping, a function, or a model, whose framework need not be installed.
Layouts = str | Plan | Mapping[str, Answer] | Callable[[str, Any], Answer] | object

# From name and array to the answer, and the rule that gives it.
Found = tuple[LayoutLike | LeaveAlone, str]
NameRule = Callable[[str, Any], Found]

# From the names in a tree to a rule.
Source = Callable[[Names], NameRule]

_AMBIGUOUS = "unknown: its name does not tell the fan-in; the model does (gcx.optax.layouts)"

# Rows of a preset: end of the path, layout or None, reason. The first row that matches and fits the
# rank counts; its layout is a guess. The patterns are regular expressions because the "*" of a glob
# crosses "/", and "conv_transpose_block/conv/w" is not a transposed convolution.
PRESETS: dict[str, tuple[tuple[str, str | None, str], ...]] = {
    "flax": (
        (r"(query|key|value)/kernel", "ioo", "attention projection"),
        # Names that flax makes.
        (r"(Scan|Vmap)[A-Z][^/]*/.*kernel", None, _AMBIGUOUS),
        (r"DenseGeneral_[^/]*/kernel", "io", "kernel"),
        (r"(DenseGeneral|Einsum|ConvLocal|ConvTranspose)_[^/]*/kernel", None, _AMBIGUOUS),
        (r"/kernel", "...o", "kernel"),
    ),
    "haiku": (
        (r"__layer_stack[^/]*/.*conv[^/]*_transpose[^/]*/w", "b...oi", "stack of convolutions"),
        (r"__layer_stack[^/]*/.*/(w|w_i|w_h)", "b...o", "stack of weights"),
        (r"conv[^/]*_transpose[^/]*/w", "...oi", "transposed convolution"),
        (r"/(w|w_i|w_h)", "...o", "weight"),
    ),
    "equinox": (
        (r"embed[^/]*/weight", None, "embedding"),
        (r"norm[^/]*/weight", None, "norm"),
        (r"/(weight|weight_ih|weight_hh)", "o...", "weight"),
    ),
}

# The last rows of every preset.
_NO_KERNELS: tuple[tuple[str, None, str], ...] = (
    (r"/embeddings?", None, "embedding"),
    (r"/(b|bias|bias_n|offset)", None, "bias"),
    (r"/scale", None, "norm"),
)

PRESET_NAMES = ", ".join(map(repr, PRESETS))
_NO_RULE = LeaveAlone(NO_RULE), ""


def plan(params: optax.Params, layouts: Layouts | None = None) -> Plan:
    """Show which parameters `centralize` would centralize, over which axes, and why.

    The plan has one row per leaf, in the order of `jax.tree.leaves` (None included). Leaves that
    are not arrays of floating dtype, and a fan-in below 2, are always left alone.

    Parameters
    ----------
    params : pytree
        Parameters or gradients, or their `jax.ShapeDtypeStruct`.
    layouts : model, Plan, mapping, callable or str, optional
        As in `centralize`. If `params` is an nnx or Equinox model, it may be left out.

    Raises
    ------
    TypeError
        If `layouts` has none of these forms, or gives anything but a layout, None or `LeaveAlone`.
    ValueError
        If a key matches no parameter, a plan lacks one, or a layout does not fit the shape.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import gcx.optax
    >>> conv = {"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)}
    >>> print(gcx.optax.plan({"Conv_0": conv, "token": jnp.zeros((1, 8))}, "flax"))
    parameter      shape    layout  reason
    Conv_0/bias    8        -       bias
    Conv_0/kernel  3x3x1x8  ...o    guess by name: kernel
    token          1x8      -       unknown: no rule for this name
    1 of 3 parameters centralized
    """
    if layouts is None:
        framework = _models.framework_of(params)
        if framework is None:
            _refuse_foreign(params, "params")
            raise TypeError("a tree of arrays has no layers: give layouts, e.g. 'flax'")
        layouts = params
        params = framework.params(params) if framework.params else None
    return plan_of(params, source_of(layouts), {})


def plan_of(params: optax.Params, source: Source, axes: Mapping[str, tuple[str, ...]]) -> Plan:
    """Make the plan of a tree; `axes` holds the mesh axes of the fan-ins that are split."""
    rule = source(names_of(params))
    return Plan(
        _row(name, leaf, rule, is_split=bool(axes.get(name))) for name, leaf in named_leaves(params)
    )


def _row(name: str, leaf: Any, rule: NameRule, *, is_split: bool) -> PlanRow:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):  # JAX's own floats have a dtype
        return PlanRow(name, (), None, "not an array")
    shape = tuple(leaf.shape)
    try:
        is_numeric = is_floating(leaf.dtype)
    except TypeError:  # a dtype that neither JAX nor NumPy knows
        raise TypeError(f"{name} is a {name_kind(leaf)}, not an array of JAX or NumPy") from None
    if not is_numeric:
        return PlanRow(name, shape, None, "not of floating dtype")
    answer, reason = rule(name, leaf)
    row = decide_row(name, shape, answer, reason)
    if row.layout is None and is_split and not isinstance(answer, LeaveAlone):
        layout = as_layout(answer)
        if layout.split(shape)[1]:  # a part of a longer fan-in
            return row._replace(layout=layout, reason=reason)
    return row


def source_of(layouts: Layouts) -> Source:
    """Read any form of `layouts`; an error for anything else."""
    if isinstance(layouts, str):
        if layouts not in PRESETS:
            raise ValueError(
                f"layouts: no preset {layouts!r}; there are {PRESET_NAMES}. "
                "To give every parameter one layout use a mapping: {'*': 'o...'}"
            )
        return lambda _: partial(_guess, layouts)
    if isinstance(layouts, Plan):
        return lambda _: partial(_look_up, layouts)
    # Before the other forms: a model may be callable, or a mapping.
    framework = _models.framework_of(layouts)
    if framework is not None:
        if framework.params is None:
            raise TypeError(
                f"a {framework.module} model has no layers before it sees an input: give "
                "gcx.optax.layouts(model, *example_inputs), where an example input is an array "
                "or jax.ShapeDtypeStruct(shape, dtype)"
            )
        found = {name: _as_given(answer) for name, answer in _models.layouts(layouts).items()}
        absent = LeaveAlone("unknown: the model has no parameter of this name"), ""
        return lambda _: lambda name, _leaf: found.get(name, absent)
    if isinstance(layouts, Mapping):
        return _read_mapping(layouts)
    _refuse_foreign(layouts, "layouts")  # models of other frameworks are callable
    if callable(layouts) and not isinstance(layouts, type):
        return lambda _: lambda name, leaf: _as_given(layouts(name, leaf))
    raise TypeError(
        f"layouts is an nnx or Equinox module or a dict or list of them, a mapping from path to "
        "layout or None, a function of path and array, a plan, or a preset "
        f"({PRESET_NAMES}), not {name_kind(layouts)}"
    )


def _refuse_foreign(model: object, name: str) -> None:
    if hint := hint_at_adapter(model, "optax"):
        raise TypeError(f"{name} is a {name_kind(model)}{hint}")


def _guess(preset: str, name: str, leaf: Any) -> Found:
    for pattern, layout, reason in (*PRESETS[preset], *_NO_KERNELS):
        if not re.search(f"{pattern}$", f"/{name}"):
            continue
        if layout is None:
            return LeaveAlone(reason), ""
        with suppress(ValueError):  # of another rank
            if as_layout(layout).fan_in_axes(leaf.ndim):
                return layout, f"guess by name: {reason}"
    return _NO_RULE


def _look_up(plan: Plan, name: str, leaf: Any) -> Found:
    (layout,) = layouts_for([(name, leaf)], plan, like=None)
    reason = plan[name].reason
    return layout or LeaveAlone(reason), reason


def _read_mapping(layouts: Mapping[str, Answer]) -> Source:
    for path, answer in layouts.items():
        if not isinstance(answer, Answer):
            raise TypeError(
                f"layouts: {path!r} has a {name_kind(answer)}; a mapping is from path to layout, "
                f"LeaveAlone or None. Or give the model, or a preset ({PRESET_NAMES})"
            )
    found = {path: _as_given(answer) for path, answer in layouts.items()}

    def source(names: Names) -> NameRule:
        keys = match_all(found, names.visible, what="layouts", hidden=names.hidden)
        return lambda name, _leaf: found[keys[name]] if name in keys else _NO_RULE

    return source


def _as_given(answer: Answer) -> Found:
    given = LeaveAlone("as given") if answer is None else answer
    return given, given.layer if isinstance(given, _models.LayerLayout) else "as given"
