"""What happens to each parameter of a model, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gcx.plan import LeaveAlone, Plan, PlanRow
from gcx.torch._fan_in import FanIn
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

    def is_about(self, parameter: Tensor) -> bool:
        """Whether the model still holds this parameter where it was found."""
        return vars(self.holder)["_parameters"].get(self.key) is parameter


class Weight(NamedTuple):
    """A parameter to centralize."""

    name: str
    parameter: Tensor
    fan_in: FanIn


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
        holds; the first key counts that covers a parameter. A value is a layout, the fan-in axes
        (an integer or a sequence of them), or None, which leaves alone. For layers of your own,
        `register_layer` says it once for all models.

    Returns
    -------
    gcx.plan.Plan
        One row per parameter. The weight (in, out / G, kernel...) of a transposed convolution of
        G groups is seen as (G, in / G, out / G, kernel...): the layout is that of this view, whose
        shape is in ``row.view`` and in the reason.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If a key of `overrides` covers no parameter, or a value does not fit the one it covers.
    RuntimeError
        If a parameter has no shape yet (lazy layers), or no longer that of its layer (FSDP1).

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
    given = answers(overrides or {}, [(owned.name, owned.parameter) for owned in owned_by_all])
    decisions: dict[Tensor, Decision] = {}
    for owned in owned_by_all:
        _check_has_shape(owned)
        found, rule = given.get(owned.parameter), "override"
        if found is None:
            found, rule = _ask(owned, layers)
        decision = _decide(owned, found, rule)
        earlier = decisions.get(owned.parameter)
        decisions[owned.parameter] = decision if earlier is None else _tied(earlier, decision)
    return decisions


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
    found, rule = answer(owned.owner, owned.weight)
    if isinstance(found, LeaveAlone):
        return found, rule
    if owned.objection:
        return LeaveAlone(owned.objection), rule
    if layers == "conv" and not isinstance(owned.owner, (*CONVOLUTIONS, *TRANSPOSED)):
        return _NOT_CONVOLUTION, rule
    return found, rule


def _decide(owned: Owned, found: FanIn | LeaveAlone, rule: str) -> Decision:
    parameter = owned.parameter

    def decision(fan_in: FanIn | None, reason: str) -> Decision:
        return Decision(owned.name, fan_in, reason, owned.holder, owned.key)

    if not (parameter.is_floating_point() or parameter.is_complex()):
        return decision(None, f"dtype {parameter.dtype}".replace("torch.", ""))
    if isinstance(found, LeaveAlone):
        return decision(None, found.reason)
    if not found.fits(parameter):
        expected = f"rank {found.ndim}" if found.ndim is not None else f"layout {found.layout}"
        of_rank = f"of rank {parameter.ndim}, where a {rule} has {expected}"
        raise RuntimeError(_flattened(owned.name, of_rank))
    size = found.size(parameter)
    if size < 2:
        return decision(None, f"fan-in {size}: subtracting its mean would freeze it")
    view = _view_shape(parameter, found)
    if view is not None:
        shape = "x".join(map(str, view))
        return decision(found, f"{rule}, {found.groups} groups: seen as {shape}")
    return decision(found, rule)


def _flattened(name: str, what: str) -> str:
    return (
        f"{name} is {what}: the shapes of the layers are gone, as FSDP1 and DeepSpeed do it, so "
        "there is no fan-in to average over. Shard with torch.distributed.fsdp.fully_shard, which "
        "keeps them, or call gcx.torch.centralize_in_backward(model) before the model is wrapped"
    )


def _tied(first: Decision, second: Decision) -> Decision:
    """One decision for a parameter of two owners."""
    if first.fan_in == second.fan_in:
        return first
    reason = f"tied, and the rules differ: {first.reason}; {second.name}: {second.reason}"
    return first._replace(fan_in=None, reason=reason)
