"""The weights of an optimizer that count now: parameters, groups and switches may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, TypeVar
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from gcx._decisions import nothing_to_centralize
from gcx._options import Options
from gcx.plan import Plan, PlanRow
from gcx.torch._optimizer import Group
from gcx.torch._plan import HINT, Decision, decide
from gcx.torch._weights import Weight, weights_of, with_sizes

T = TypeVar("T")

# The key by which a parameter group switches Gradient Centralization off; it is on by default.
SWITCH = "centralize"
_NAMELESS = "?"  # a parameter that was never in the model
_STRANGER = "unknown: it is not in the model"
_SWITCHED_OFF = f"switched off: {SWITCH!r} is False in its parameter group"

# Advice for wrappers that flatten weights, or update them without a step.
IN_BACKWARD = "call gcx.torch.centralize_in_backward(model) before the model is wrapped"


class Weak(ref[T]):
    """A reference to an object that holds this, and is freed without the garbage collector.

    A copy of both refers to the copy.
    """

    def __reduce__(self) -> Any:
        found = self()
        return Weak, (set() if found is None else found,)  # a set of which nobody knows is freed


class Targets:
    """The weights of an optimizer that are centralized; changes of the model are followed."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, options: Options) -> None:
        self._optimizer: Callable[[], Any] = Weak(optimizer)
        self._model = model
        self._options = options
        self._decisions: dict[Tensor, Decision] = {}
        self._idle = ""  # a parameter that replaced a frozen one and is trained by nobody
        self._uses = 0  # of `by_group`, which each step calls
        self._states = 0
        self._decide()

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, which the handle of the user keeps."""
        optimizer: Optimizer = self._optimizer()
        return optimizer

    def by_group(self) -> list[tuple[Group, list[Weight]]]:
        """List the groups with something to centralize, each with its weights.

        Weights stay the same objects until a parameter of their group changes. Raises a
        RuntimeError if a parameter that can move is not, or no longer, in the model.
        """
        self._uses += 1
        for layers, name, layer in self._layers:
            if layers.get(name) is not layer:
                self._decide()
                break
        if self._idle:
            self._decide()  # it may have been added, or frozen
            if self._idle:
                raise RuntimeError(_why_idle(self._idle))
        found = []
        for position, group in enumerate(self._optimizer().param_groups):
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

    def others(self) -> Iterator[Weight]:
        """List the weights of the model that are in no group that is switched on."""
        on = {p for g in self.optimizer.param_groups if is_on(g) for p in g["params"]}
        rest = ((p, d) for p, d in self._decisions.items() if p not in on and d.is_about(p))
        return weights_of(rest, reproducible=self._options.reproducible)

    def switches(self) -> list[object]:
        """List for each group whether it is switched on."""
        return [group.get(SWITCH, True) for group in self._optimizer().param_groups]

    def plan(self) -> Plan:
        """Show the decision on each parameter of the optimizer, by the model as it is now."""
        self._decide()
        held = {p: is_on(group) for group in self.optimizer.param_groups for p in group["params"]}
        rows = [(d.row, held[p]) for p, d in self._decisions.items() if p in held]
        return Plan(
            row if on or not row.layout else row._replace(layout=None, reason=_SWITCHED_OFF)
            for row, on in rows
        )

    def refuse_empty(self) -> None:
        """Raise a RuntimeError if no parameter is in the model, a ValueError if none is taken."""
        if any(self.weights()):
            return
        plan = self.plan()
        if all(row.name == _NAMELESS for row in plan):
            raise RuntimeError(_why_missing(plan[0]))
        kind = type(self.optimizer).__name__
        raise ValueError(nothing_to_centralize(plan, f"this {kind}", hint=HINT))

    def note_states(self) -> None:
        """Note that the states of the optimizer are from before its next step."""
        self._uses, self._states = 0, self._count_states()

    def were_bypassed(self) -> bool:
        """Return True, once, if the optimizer has new states, and its step did not make them."""
        is_bypassed = not self._uses and self._count_states() > self._states
        if is_bypassed:
            self.note_states()
        return is_bypassed

    def _count_states(self) -> int:
        return sum(map(bool, self.optimizer.state.values()))

    def _settle(self, position: int, parameters: Sequence[Tensor]) -> _Settled:
        for parameter in parameters:
            if not self._is_known(parameter):
                self._decide()  # it may have been added, or moved
                if not self._is_known(parameter):
                    raise RuntimeError(_why_missing(self._decisions[parameter].row))
        decisions = [self._decisions[parameter] for parameter in parameters]
        settled = _Settled(parameters, decisions, self._options.reproducible)
        self._settled[position] = settled
        return settled

    def _is_known(self, parameter: Tensor) -> bool:
        decision = self._decisions.get(parameter)
        if decision is None:
            return False
        if decision.holder is None:
            return not parameter.requires_grad and parameter.grad is None
        return decision.is_about(parameter)

    def _decide(self) -> None:
        """Look at the model as it is, and list parameters that are not in it too."""
        found, before = decide(self._model, self._options), self._decisions
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        suspects = {d.row.name for p, d in before.items() if not p.requires_grad} | {self._idle}
        rest = found.keys() - {*held}
        trained = [d.row.name for p, d in found.items() if p in rest and p.requires_grad]
        self._idle = next((name for name in trained if name in suspects), "")
        for parameter in held:
            if parameter not in found:
                name = before[parameter].row.name if parameter in before else _NAMELESS
                row = PlanRow(name, tuple(parameter.shape), None, _STRANGER)
                found[parameter] = Decision(row, None, "")
        self._decisions = found
        self.parameters = with_sizes(found)  # of the model, and all others of the optimizer
        self._settled: dict[int, _Settled] = {}  # by the position of the group
        self._layers = [
            (layers, name, layer)
            for module in self._model.modules()
            # torch.jit has no dict here; layers that it compiled cannot be replaced.
            if isinstance(layers := vars(module).get("_modules"), dict)
            for name, layer in layers.items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model that holds the handle has other parameters.
        return {**vars(self), "_settled": {}}


class _Settled:
    """The weights of a parameter group, until a parameter of the group changes.

    Frozen parameters may be missing in the model: peft registers some anew in each forward pass.
    """

    def __init__(
        self, parameters: Sequence[Tensor], decisions: Sequence[Decision], reproducible: bool
    ) -> None:
        pairs = [*zip(parameters, decisions, strict=True)]
        self.weights = list(weights_of(pairs, reproducible=reproducible))
        self._parameters = list(parameters)
        self._held = [(vars(d.holder), d.key, p) for p, d in pairs if d.holder is not None]
        self._missing = [p for p, d in pairs if d.holder is None]
        self._tensors = [weight.parameter for weight in self.weights]
        self._shapes = list(map(_shape_of, self._tensors))

    def holds_for(self, parameters: Sequence[Tensor]) -> bool:
        """Return True if the model holds the same parameters as before, in the same shapes.

        Every step asks this, so it makes no call for each parameter. `Decision.is_about` answers
        for modules without a dict of parameters, such as scripted ones.
        """
        try:
            for module, key, parameter in self._held:
                if module["_parameters"][key] is not parameter:
                    return False
        except KeyError:
            return False
        for parameter in self._missing:
            if parameter.requires_grad or parameter.grad is not None:
                return False
        return (
            len(parameters) == len(self._parameters)
            and all(map(is_, parameters, self._parameters))
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


def find_owner(hooks: Mapping[int, object], kind: type[T]) -> T | None:
    """Find the object of a class among those whose methods are hooks."""
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return next((owner for owner in owners if isinstance(owner, kind)), None)


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


def _why_idle(name: str) -> str:
    return (
        f"{name} was frozen, and has been replaced by a parameter that can train, which the "
        "optimizer does not hold; add it to the optimizer, or freeze it. If another optimizer "
        "holds it, centralize this one anew"
    )


def _why_missing(row: PlanRow) -> str:
    if row.name != _NAMELESS:
        return (
            f"{row.name} was replaced in the model, and the optimizer goes on updating the old one "
            "(a new layer, load_state_dict(assign=True), to_empty, fully_shard and weight_norm "
            "replace parameters); make the optimizer after that, and centralize the new one"
        )
    flat = f"; if parameters were flattened (DeepSpeed), {IN_BACKWARD}"
    return (
        f"the optimizer holds a parameter of shape {row.shape} that is not in the model. Give the "
        "model that holds them all (torch.nn.ModuleList makes one of several), or put it into a "
        f"parameter group with {SWITCH!r}: False{flat if len(row.shape) < 2 else ''}"
    )
