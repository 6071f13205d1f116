"""The plan of a model: which parameters are centralized over which axes, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor, nn

from gcx._decisions import LEFT_ALONE, decide_row, merge
from gcx._frameworks import describe, hint_at_adapter
from gcx._names import match, match_all, naming
from gcx._options import Layers, Options
from gcx._rules import MASKED, NOT_CONVOLUTION, unknown
from gcx._rules import Answer as OneAnswer
from gcx.layout import Layout, LayoutLike, as_layout
from gcx.plan import LeaveAlone, Plan, PlanRow
from gcx.torch._layers import CONVOLUTIONS, RULES, TRANSPOSED, Owned, flattened, owned_parameters
from gcx.torch._packages import NAMES_ANYWHERE, Answer

Key = str | Tensor | nn.Module
# The remedy for unknown parameters.
HINT = "gcx.torch.register_layer or overrides can tell where unknown ones have a fan-in"
# By name or glob, parameter, or module (all of its parameters); None leaves alone.
Overrides = Mapping[Key, OneAnswer]


class Decision(NamedTuple):
    """The row of one parameter, the module that registers it, and the layer that decided."""

    row: PlanRow
    holder: nn.Module | None  # None if the model does not hold the parameter
    key: str  # of the parameter in its holder
    layer: nn.Module | None = None  # None if an override decided


def plan(model: nn.Module, *, layers: Layers = "all", overrides: Overrides | None = None) -> Plan:
    """Show which parameters of a model would be centralized over which axes, and which not and why.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. The layer that owns a parameter decides, never the rank of the parameter. A
        parameter that no rule knows is left alone; so is a weight that layers share, unless they
        agree on its fan-in.
    layers : {"all", "conv"}, optional
        ``"conv"`` is the paper's variant for convolutions alone, of any rank.
    overrides : mapping, optional
        Answers that take precedence over the layers. A key is a name or a glob
        (``"encoder.*.weight"``), a parameter, or a module for all of its parameters (a layout skips
        its vectors). The first key that covers a parameter counts. A value is a layout or, to leave
        the parameter alone, None or `gcx.plan.LeaveAlone` with the reason.

    Returns
    -------
    gcx.plan.Plan
        One row per parameter.

    Raises
    ------
    TypeError, ValueError
        If `model` is not a module, or a key or value of `overrides` does not fit.
    RuntimeError
        If a parameter has no shape yet (lazy layers), or has lost it (FSDP1 flattens).

    Examples
    --------
    >>> from torch import nn
    >>> import gcx.torch
    >>> model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(48, 2))
    >>> print(gcx.torch.plan(model))
    parameter  shape  layout  reason
    0.weight   8x4x3  o...    Conv1d
    0.bias     8      -       bias
    1.weight   8      -       norm
    1.bias     8      -       bias
    3.weight   2x48   o...    Linear
    3.bias     2      -       bias
    2 of 6 parameters centralized
    >>> gcx.torch.plan(model, overrides={"3.*": None})
    <gcx plan: 1 of 6 parameters centralized>
    """
    decisions = decide(model, Options(layers=layers, overrides=overrides))
    return Plan(decision.row for decision in decisions.values())


def decide(model: nn.Module, options: Options) -> dict[Tensor, Decision]:
    """Decide on each parameter of a model, in the order of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, not {describe(model, 'torch')}")
    owned_by_all = list(owned_parameters(model))
    named = [(owned.name, owned.parameter) for owned in owned_by_all]
    given = _find_overrides(options.overrides or {}, named)
    decisions: dict[Tensor, list[Decision]] = {}
    for owned in owned_by_all:
        found, rule, layer = given.get(owned.parameter), "override", None
        if found is None:
            (found, rule), layer = _ask(owned, options.layers), owned.layer
        decision = Decision(_row(owned, found, rule), owned.holder, owned.key, layer)
        decisions.setdefault(owned.parameter, []).append(decision)
    return {
        parameter: each[0]._replace(row=merge([decision.row for decision in each]))
        for parameter, each in decisions.items()
    }


def _ask(owned: Owned, layers: Layers) -> tuple[Layout | LeaveAlone | None, str]:
    """Answer of the layer about a parameter, and the name of the rule."""
    weight = owned.parameter
    if not _is_trainable(weight):
        return LeaveAlone(f"dtype {weight.dtype}".replace("torch.", "")), ""
    # A module that knows how it uses the weights of its children takes precedence over these.
    known = next(filter(None, (RULES.find(*user) for user in owned.users)), None)
    if known is None:
        return LeaveAlone(owned.objection or _say_unknown(*owned.users[-1])), ""
    found, rule = known
    if found is None or isinstance(found, LeaveAlone):
        return found, rule
    with naming(f"the rule of {rule} answers {found!r} for {owned.name!r}"):
        layout = _fit(found, weight)
    if owned.objection:
        if not isinstance(layout, Layout) or not owned.keeps_units(layout):
            return LeaveAlone(owned.objection), ""
        rule = f"{rule}, {owned.objection.removeprefix('unknown: a ')}"
    if isinstance(found, Mapping) and _is_masked(owned):
        return MASKED, ""
    if layers == "conv" and not isinstance(owned.layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return NOT_CONVOLUTION, ""
    if layout is None:
        raise RuntimeError(_misfit(owned, found, rule))
    return layout, rule


def _say_unknown(layer: nn.Module, name: str) -> str:
    key = match(NAMES_ANYWHERE, [name]).get(name)
    alone = unknown(layer, name) if key is None else NAMES_ANYWHERE[key]
    return alone.reason + hint_at_adapter(layer, "torch")


def _is_masked(owned: Owned) -> bool:
    """Return True for a subclass of a torch layer that holds a mask of the weight's shape."""
    mask = getattr(owned.layer, "mask", None)
    return isinstance(mask, Tensor) and mask.shape == owned.parameter.shape


def _row(owned: Owned, found: Layout | LeaveAlone | None, rule: str) -> PlanRow:
    row = decide_row(owned.name, tuple(owned.parameter.shape), found, rule)
    sizes = row.layout.sizes.items() if row.layout is not None else ()
    parts = [f"{size} groups" if letter == "b" else f"{letter}={size}" for letter, size in sizes]
    return row._replace(reason=", ".join([row.reason, *parts]))


def _is_trainable(weight: Tensor) -> bool:
    """Return False for integers and floats of 8 bits."""
    return (weight.is_floating_point() or weight.is_complex()) and weight.dtype.itemsize > 1


def _fit(found: Answer, weight: Tensor) -> Layout | LeaveAlone | None:
    """Choose the answer for the rank of a weight; None if its shape does not fit."""
    one = found.get(weight.ndim) if isinstance(found, Mapping) else found
    if one is None or isinstance(one, LeaveAlone):
        return one
    layout = as_layout(one)
    with suppress(ValueError):
        if layout.split(tuple(weight.shape))[1]:
            return layout
    return None


def _misfit(owned: Owned, found: object, rule: str) -> str:
    rank, expected = owned.parameter.ndim, repr(found)
    if isinstance(found, Mapping) and rank not in found:
        expected = f"rank {' or '.join(map(str, found))}"
    what = f"of rank {rank}, where a {rule} has {expected}"
    if rank < 2:
        return flattened(owned.name, what)
    return (
        f"{owned.name} is {what}. If {type(owned.layer).__name__} has weights of another shape, "
        "gcx.torch.register_layer tells how they are to be read, and overrides for this one"
    )


def _find_overrides(
    overrides: Overrides, named: Sequence[tuple[str, Tensor]]
) -> dict[Tensor, Layout | LeaveAlone]:
    """Give each parameter the answer of the first key that covers it; see `plan` for errors."""
    found: dict[Tensor, Layout | LeaveAlone] = {}
    for key, value in overrides.items():
        alone = LEFT_ALONE if value is None else value
        for name, parameter in _find_covered(key, isinstance(alone, LeaveAlone), named):
            given = alone if isinstance(alone, LeaveAlone) else _read(alone, name, parameter)
            found.setdefault(parameter, given)
    return found


def _find_covered(
    key: Key, leaves_alone: bool, named: Sequence[tuple[str, Tensor]]
) -> list[tuple[str, Tensor]]:
    if isinstance(key, str):
        matches = match_all([key], [name for name, _ in named], what="overrides")
        return [(name, p) for name, p in named if name in matches]
    if not isinstance(key, (Tensor, nn.Module)):
        raise TypeError(
            f"overrides: a key is the name of a parameter, a glob, a parameter or a module, not "
            f"{key!r}; gcx.torch.register_layer is for a type of layer"
        )
    if isinstance(key, Tensor):
        own, problem = {key}, f"tensor of shape {tuple(key.shape)} is no parameter of the model"
    else:
        own = {p for p in key.parameters() if leaves_alone or p.ndim > 1}  # vectors are biases
        problem = f"{type(key).__name__} holds no parameter of the model"
        problem += " with two axes or more" * (not leaves_alone)
    covered = [(name, p) for name, p in named if p in own]
    if not covered:
        raise ValueError(f"overrides: this {problem}")
    return covered


def _read(value: LayoutLike, name: str, weight: Tensor) -> Layout:
    with naming(f"overrides: {name}"):
        layout = as_layout(value)
    if _fit(layout, weight) is None:
        shape = tuple(weight.shape)
        raise ValueError(f"overrides: {name} of shape {shape} does not fit {layout!r}")
    if not _is_trainable(weight):
        raise ValueError(f"overrides: {name} is of dtype {weight.dtype}, which has no gradient")
    return layout
