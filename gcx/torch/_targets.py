"""The weights of an optimizer that count now: parameters, groups and switches may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gcx.plan import Plan, PlanRow
from gcx.torch._optimizer import Group
from gcx.torch._plan import Decision, plan_of
from gcx.torch._weights import Weight, weights_of

# The key by which a parameter group switches Gradient Centralization off; it is on by default.
SWITCH = "centralize"
_SWITCHED_OFF = f"switched off: {SWITCH!r} is False in its parameter group"

# Advice for wrappers that flatten weights, or update them without a step.
IN_BACKWARD = "call gcx.torch.centralize_in_backward(model) before the model is wrapped"


class Targets:
    """The weights of an optimizer that are centralized; `decide` looks at the model as it is."""

    def __init__(
        self, optimizer: Optimizer, decide: Callable[[], dict[Tensor, Decision]], reproducible: bool
    ) -> None:
        self.optimizer = optimizer
        self._decide = decide
        self._decisions = decide()
        self._reproducible = reproducible
        self._settled: dict[int, _Settled] = {}  # by the position of the group

    def by_group(self) -> list[tuple[Group, list[Weight]]]:
        """List the groups with something to centralize, each with its weights.

        Weights stay the same objects until a parameter of their group changes. Raises a
        RuntimeError if a parameter is not, or no longer, in the model.
        """
        found = []
        for position, group in enumerate(self.optimizer.param_groups):
            if not is_on(group):
                continue
            parameters = group["params"]
            settled = self._settled.get(position)
            if settled is None or not settled.holds_for(parameters):
                settled = self._settle(position, parameters)
            if settled.weights:
                found.append((group, settled.weights))
        return found

    def weights(self) -> Iterator[Weight]:
        """List everything to centralize."""
        for _, weights in self.by_group():
            yield from weights

    def switches(self) -> list[object]:
        """List for each group whether it is switched on."""
        return [group.get(SWITCH, True) for group in self.optimizer.param_groups]

    def plan(self) -> Plan:
        """Show the decision on each parameter of the optimizer, by the model as it is now."""
        self._take(self._decide())
        held = {p: is_on(group) for group in self.optimizer.param_groups for p in group["params"]}
        known = {p: decision for p, decision in self._decisions.items() if p in held}
        rows = plan_of({p: d if held[p] else _switched_off(d) for p, d in known.items()})
        strangers = [parameter for parameter in held if parameter not in known]
        return Plan([*rows, *map(_row_of_stranger, strangers)])

    def _settle(self, position: int, parameters: Sequence[Tensor]) -> _Settled:
        decisions = [self._decision(parameter) for parameter in parameters]
        settled = _Settled(parameters, decisions, self._reproducible)
        self._settled[position] = settled
        return settled

    def _decision(self, parameter: Tensor) -> Decision:
        known = self._decisions.get(parameter)
        if known is not None and known.is_about(parameter):
            return known
        found = self._decide()  # it may have been added, or moved
        if parameter not in found:
            raise RuntimeError(_replaced(known.row.name) if known else _foreign(parameter))
        self._take(found)
        return found[parameter]

    def _take(self, decisions: dict[Tensor, Decision]) -> None:
        self._decisions = decisions
        self._settled.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model that holds the handle has other parameters.
        return {**vars(self), "_settled": {}}


class _Settled:
    """The weights of a parameter group, until a parameter of the group changes."""

    def __init__(
        self, parameters: Sequence[Tensor], decisions: Sequence[Decision], reproducible: bool
    ) -> None:
        pairs = zip(parameters, decisions, strict=True)
        self.weights = list(weights_of(pairs, reproducible=reproducible))
        self._parameters = list(parameters)
        self._holders = [(vars(decision.holder), decision.key) for decision in decisions]
        self._tensors = [weight.parameter for weight in self.weights]
        self._shapes = list(map(_shape_of, self._tensors))

    def holds_for(self, parameters: Sequence[Tensor]) -> bool:
        """Return True if the model holds the same parameters as before, in the same shapes.

        Every step asks this, so it makes no call for each parameter. `Decision.is_about` answers
        for modules without a dict of parameters, such as scripted ones.
        """
        try:
            held = [module["_parameters"][key] for module, key in self._holders]
        except KeyError:
            return False
        return (
            len(parameters) == len(held)
            and all(map(is_, parameters, self._parameters))
            and all(map(is_, parameters, held))
            and list(map(_shape_of, self._tensors)) == self._shapes
        )


_shape_of = attrgetter("shape")


def is_on(group: Group) -> bool:
    """Return the switch of a parameter group; a TypeError if it is not a bool."""
    switch = group.get(SWITCH, True)
    if not isinstance(switch, bool):
        msg = f"{SWITCH!r} in a parameter group is True or False, not {switch!r}"
        raise TypeError(msg)
    return switch


def keep_switches(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Keep the switches of parameter groups that a checkpoint does not mention.

    A hook for `Optimizer.register_load_state_dict_pre_hook`.
    """
    here = [{k: v for k, v in g.items() if k == SWITCH} for g in optimizer.param_groups]
    saved = state_dict["param_groups"]
    if len(here) != len(saved):
        return state_dict  # torch has an error for that
    groups = [{**switch, **group} for switch, group in zip(here, saved, strict=True)]
    return {**state_dict, "param_groups": groups}


def _switched_off(decision: Decision) -> Decision:
    if decision.row.layout is None:
        return decision
    return decision._replace(row=decision.row._replace(layout=None, reason=_SWITCHED_OFF))


def _row_of_stranger(parameter: Tensor) -> PlanRow:
    return PlanRow("?", tuple(parameter.shape), None, "unknown: it is not in the model")


def _replaced(name: str) -> str:
    return (
        f"{name} was replaced in the model, and the optimizer goes on updating the old one "
        "(load_state_dict(assign=True), to_empty, fully_shard and weight_norm replace "
        "parameters); make the optimizer after that, and centralize the new one"
    )


def _foreign(parameter: Tensor) -> str:
    return (
        f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the "
        f"model. Give the model that holds them all (torch.nn.ModuleList makes one of several), or "
        f"put it into a parameter group with {SWITCH!r}: False; if parameters were flattened "
        f"(DeepSpeed), {IN_BACKWARD}"
    )
