"""What happens to each parameter of a model, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Size, Tensor, nn

from gcx._globs import matches, no_match
from gcx._rules import unknown
from gcx.layout import Layout, LayoutLike
from gcx.plan import LeaveAlone, Plan, PlanRow
from gcx.torch._layers import CONVOLUTIONS, TRANSPOSED, answer
from gcx.torch._parameters import Owned, check_has_shape, flattened, owned_parameters
from gcx.torch._weights import FanIn, Weight, as_fan_in, is_trainable

Layers = Literal["all", "conv"]

_NOT_CONVOLUTION = LeaveAlone("not a convolution, and layers='conv'")


class Decision(NamedTuple):
    """What happens to one parameter: centralized over `fan_in`, or left alone if that is None."""

    name: str
    fan_in: FanIn | None
    reason: str
    holder: nn.Module  # where the parameter is registered, as `key`
    key: str
    shape: Size  # which FSDP1 changes

    def is_about(self, parameter: Tensor) -> bool:
        """Whether the model still holds this parameter where it was found, and as it was."""
        # Asked of each parameter at each step, so not by getattr where there is a dict to look in.
        held = vars(self.holder).get("_parameters")
        if isinstance(held, dict):
            found = held.get(self.key)
        else:  # torch.jit keeps parameters elsewhere
            found = getattr(self.holder, self.key, None)
        return found is parameter and parameter.shape == self.shape


def plan(model: nn.Module, *, layers: Layers = "all", overrides: Overrides | None = None) -> Plan:
    """Show what would be centralized in a model, over which axes, and what is left alone and why.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Its parameters of any shape are judged by the layer that owns them, never by
        their rank; a layer that nobody declared is left alone, and says so.
    layers : {"all", "conv"}, optional
        ``"conv"`` is the variant of the paper for convolutions alone, of any rank.
    overrides : mapping, optional
        Answers that come before those of the layers. A key is the name of a parameter or a glob
        (``"encoder.*.weight"``), a parameter itself, or a module, which stands for all that it
        holds (but a layout is not for its vectors); the first key counts that covers a parameter.
        A value is a layout, the fan-in axes (an integer or a sequence of them), a `FanIn` for a
        weight in groups, or what leaves alone: None, or `gcx.plan.LeaveAlone` with the reason. For
        layers of your own, `register_layer` says it once for all models.

    Returns
    -------
    gcx.plan.Plan
        One row per parameter. The weight (in, out / G, kernel...) of a transposed convolution of
        G groups is seen as (G, in / G, out / G, kernel...): the layout is that of this view, whose
        shape is in ``row.view`` and in the reason.

    Raises
    ------
    TypeError
        If `model` is not a module, or `overrides`, a key or a value of it is of another kind.
    ValueError
        If a key of `overrides` covers no parameter, or a value does not fit the one it covers.
    RuntimeError
        If a parameter has no shape yet (lazy layers), or another than its layer gives it: FSDP1
        flattens it.

    Notes
    -----
    What is unknown is left alone until `register_layer` or `overrides` tells where its fan-in is.

    A weight of several layers, such as an embedding that is the head of a language model too, is
    left alone unless all of them average over the same axes; `overrides` can decide otherwise.

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
    return plan_of(decide(model, layers, overrides))


def plan_of(decisions: dict[Tensor, Decision]) -> Plan:
    """Show decisions as a table."""
    return Plan(
        PlanRow(
            name=decision.name,
            shape=tuple(parameter.shape),
            layout=None if decision.fan_in is None else decision.fan_in.layout,
            reason=decision.reason,
            view=_view_shape(parameter, decision.fan_in),
        )
        for parameter, decision in decisions.items()
    )


def nothing_to_centralize(kind: str, plan: Plan) -> str:
    """Tell that there is nothing to centralize, and what can be done about what is unknown."""
    message = f"there is nothing to centralize in this {kind}:\n{plan}"
    if any(row.reason.startswith("unknown") for row in plan):
        message += (
            "\ngcx.torch.register_layer or overrides can tell where unknown ones have a fan-in"
        )
    return message


def _view_shape(parameter: Tensor, fan_in: FanIn | None) -> tuple[int, ...] | None:
    is_view = fan_in is not None and fan_in.groups > 1
    return fan_in.view_shape(parameter) if fan_in is not None and is_view else None


def decide(
    model: nn.Module, layers: Layers = "all", overrides: Overrides | None = None
) -> dict[Tensor, Decision]:
    """Settle what happens to each parameter of a model, in the order of the model."""
    if not isinstance(model, nn.Module):
        msg = f"model is a torch.nn.Module, not a {type(model).__name__}"
        raise TypeError(msg)
    check_choice("layers", layers, ("all", "conv"))
    owned_by_all = list(owned_parameters(model))
    for owned in owned_by_all:
        check_has_shape(owned)
    named = [(owned.name, owned.parameter) for owned in owned_by_all]
    given = answers({} if overrides is None else overrides, named)
    decisions: dict[Tensor, list[Decision]] = {}
    for owned in owned_by_all:
        found, rule = given.get(owned.parameter), "override"
        if found is None:
            found, rule = _ask(owned, layers)
        decisions.setdefault(owned.parameter, []).append(_decide(owned, found, rule))
    return {parameter: _agreed(parameter, each) for parameter, each in decisions.items()}


def weights_of(
    decisions: Iterable[tuple[Tensor, Decision]], *, reproducible: bool
) -> Iterator[Weight]:
    """List the parameters to centralize; a TypeError if bits cannot be promised that shall be."""
    for parameter, decision in decisions:
        if decision.fan_in is not None:
            weight = Weight(decision.name, parameter, decision.fan_in, reproducible)
            weight.check(parameter)
            yield weight


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError unless an option has one of the values it can have."""
    if value not in choices:
        msg = f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}"
        raise ValueError(msg)


def _ask(owned: Owned, layers: Layers) -> tuple[FanIn | LeaveAlone, str]:
    """Answer of the layer about a parameter, and the name of the rule."""
    # A module that knows how it uses the weights of its children comes before these.
    known = next(filter(None, (answer(*user) for user in owned.users)), None)
    if known is not None and isinstance(known[0], LeaveAlone):
        return known
    if owned.objection:
        return LeaveAlone(owned.objection), ""
    if known is None:
        return _unknown(owned), ""
    if layers == "conv" and not isinstance(owned.layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return _NOT_CONVOLUTION, ""
    return known


def _unknown(owned: Owned) -> LeaveAlone:
    if owned.parameter.ndim < 2:
        return LeaveAlone(f"a {'vector' if owned.parameter.ndim else 'scalar'} has no fan-in")
    return unknown(*owned.users[-1])


def _decide(owned: Owned, found: FanIn | LeaveAlone, rule: str) -> Decision:
    parameter = owned.parameter

    def decision(fan_in: FanIn | None, reason: str) -> Decision:
        return Decision(owned.name, fan_in, reason, owned.holder, owned.key, parameter.shape)

    if not is_trainable(parameter):
        return decision(None, f"dtype {parameter.dtype}".replace("torch.", ""))
    if isinstance(found, LeaveAlone):
        return decision(None, found.reason)
    if not found.fits(parameter):
        raise RuntimeError(_misfit(owned, found, rule))
    size = found.size(parameter)
    if size < 2:
        return decision(None, f"fan-in {size}: subtracting its mean would freeze it")
    view = _view_shape(parameter, found)
    if view is not None:
        shape = "x".join(map(str, view))
        return decision(found, f"{rule}, {found.groups} groups: seen as {shape}")
    return decision(found, rule)


def _misfit(owned: Owned, found: FanIn, rule: str) -> str:
    rank = owned.parameter.ndim
    expected = found if found.ndim in (None, rank) else f"rank {found.ndim}"
    what = f"of rank {rank}, where a {rule} has {expected}"
    if rank < 2:
        return flattened(owned.name, what)
    return (
        f"{owned.name} is {what}. If {type(owned.layer).__name__} has weights of another shape, "
        "gcx.torch.register_layer tells how they are to be read, and overrides for this one"
    )


def _agreed(parameter: Tensor, decisions: list[Decision]) -> Decision:
    """One decision for a parameter, which may have several owners."""
    first, *others = decisions
    means = {_what_is_averaged(parameter, decision.fan_in) for decision in decisions}
    if len(means) == 1:
        return first
    views = {first.reason: first.reason}
    for other in others:
        views.setdefault(other.reason, f"{other.name}: {other.reason}")
    reason = f"tied, and the rules differ: {'; '.join(views.values())}"
    return first._replace(fan_in=None, reason=reason)


def _what_is_averaged(
    parameter: Tensor, fan_in: FanIn | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and axes, which two rules can describe in two ways."""
    if fan_in is None:
        return None
    shape = fan_in.view_shape(parameter)
    return shape, fan_in.layout.fan_in_axes(len(shape))


Key = str | Tensor | nn.Module
Value = FanIn | LayoutLike | int | Sequence[int] | LeaveAlone | None
# By name or glob, parameter, or module (all of its parameters); None leaves alone.
Overrides = Mapping[Key, Value]

_AS_GIVEN = LeaveAlone("left alone by an override")


def answers(
    overrides: Overrides, named: Iterable[tuple[str, Tensor]]
) -> dict[Tensor, FanIn | LeaveAlone]:
    """Give each parameter the answer of the first key that covers it.

    Raises a TypeError for a key or a value of the wrong kind, and a ValueError for a key that
    covers nothing, or a value that does not fit the weight.
    """
    if not isinstance(overrides, Mapping):
        msg = f"overrides is a mapping from names to layouts, not {overrides!r}"
        raise TypeError(msg)
    named = list(named)
    found: dict[Tensor, FanIn | LeaveAlone] = {}
    for key, value in overrides.items():
        covered = [(name, p) for name, p in named if _covers(key, name, p)]
        leaves_alone = value is None or isinstance(value, LeaveAlone)
        if isinstance(key, nn.Module) and not leaves_alone:
            # The vectors of a module are its biases, which have no axes to speak of.
            covered = [(name, p) for name, p in covered if p.ndim > 1]
        if not covered:
            raise ValueError(_covers_nothing(key, leaves_alone, [name for name, _ in named]))
        for name, parameter in covered:
            found.setdefault(parameter, _answer(value, name, parameter))
    return found


def _covers(key: Key, name: str, parameter: Tensor) -> bool:
    if isinstance(key, str):
        return matches(key, name)
    if isinstance(key, nn.Module):
        return any(parameter is own for own in key.parameters())
    if isinstance(key, Tensor):
        return parameter is key
    msg = (
        f"overrides: a key is the name of a parameter, a glob, a parameter or a module, not "
        f"{key!r}; gcx.torch.register_layer is for a type of layer"
    )
    raise TypeError(msg)


def _covers_nothing(key: Key, leaves_alone: bool, names: list[str]) -> str:
    if isinstance(key, nn.Module):
        what = "parameters of the model" + ("" if leaves_alone else " with two axes or more")
        return f"overrides: a {type(key).__name__} holds no {what}"
    if isinstance(key, Tensor):
        return f"overrides: a tensor of shape {tuple(key.shape)} is no parameter of the model"
    return no_match(key, names, what="overrides")


def _answer(value: Value, name: str, weight: Tensor) -> FanIn | LeaveAlone:
    if value is None:
        return _AS_GIVEN
    if isinstance(value, LeaveAlone):
        return value
    if isinstance(value, (FanIn, Layout, str)):
        fan_in = as_fan_in(value)
    else:
        fan_in = FanIn(_layout_of_axes(value, name, weight.ndim))
    if not fan_in.fits(weight):
        msg = f"overrides: {name} of shape {tuple(weight.shape)} does not fit {fan_in}"
        raise ValueError(msg)
    if not is_trainable(weight):
        msg = f"overrides: {name} is of dtype {weight.dtype}, which has no gradient"
        raise ValueError(msg)
    return fan_in


def _layout_of_axes(value: int | Sequence[int], name: str, ndim: int) -> Layout:
    axes = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):
        msg = (
            f"overrides: the value for {name} is a layout, the axes of its fan-in, or None to "
            f"leave it alone, not {value!r}"
        )
        raise TypeError(msg)
    if not axes or not all(-ndim <= axis < ndim for axis in axes):
        msg = (
            f"overrides: {name} has rank {ndim}, and {value!r} is not fan-in axes of it; None "
            "leaves it alone"
        )
        raise ValueError(msg)
    fan_in = {axis % ndim for axis in axes}
    return Layout("".join("i" if axis in fan_in else "o" for axis in range(ndim)))
