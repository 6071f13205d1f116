"""What happens to each parameter of a model, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from torch import Size, Tensor, nn
from torch.nn.parameter import is_lazy

from gcx._names import naming
from gcx._rules import unknown
from gcx.plan import LeaveAlone, Plan, PlanRow
from gcx.torch._fan_in import FanIn, is_trainable
from gcx.torch._layers import CONVOLUTIONS, TRANSPOSED, answer
from gcx.torch._overrides import Overrides, answers
from gcx.torch._reparametrized import Owned, owned_parameters

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


class Weight(NamedTuple):
    """A parameter to centralize, and whether its means are to have equal bits everywhere."""

    name: str
    parameter: Tensor
    fan_in: FanIn
    reproducible: bool = False

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor of the shape of the parameter, as `FanIn.mean`."""
        return self.fan_in.mean(tensor, reproducible=self.reproducible)

    def check(self, tensor: Tensor) -> None:
        """Raise a TypeError that names the weight if the bits of a mean cannot be promised."""
        if self.reproducible:
            with naming(self.name):
                self.fan_in.check_reproducible(tensor)


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
        _check_has_shape(owned)
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


def _check_has_shape(owned: Owned) -> None:
    if is_lazy(owned.parameter):
        msg = (
            f"{owned.name} has no shape yet: it belongs to a lazy layer; run one forward pass of "
            "the model first"
        )
        raise RuntimeError(msg)
    if getattr(owned.parameter, "_is_flat_param", False):
        raise RuntimeError(_flattened(owned.name, "a flat buffer of several parameters"))


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
        return _flattened(owned.name, what)
    return (
        f"{owned.name} is {what}. If {type(owned.layer).__name__} has weights of another shape, "
        "gcx.torch.register_layer tells how they are to be read, and overrides for this one"
    )


def _flattened(name: str, what: str) -> str:
    return (
        f"{name} is {what}: the shapes of the layers are gone, as FSDP1 and DeepSpeed do it, so "
        "there is no fan-in to average over. Shard with torch.distributed.fsdp.fully_shard, which "
        "keeps them, or call gcx.torch.centralize_in_backward(model) before the model is wrapped"
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
