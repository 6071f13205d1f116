"""The weights of an optimizer that count now: parameters, groups and switches may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, getitem, is_, methodcaller
from typing import Any, TypeVar
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from gcx._decisions import nothing_to_centralize
from gcx._options import Options
from gcx.plan import Plan, PlanRow
from gcx.torch._optimizer import Group
from gcx.torch._plan import HINT, Decision, decide
from gcx.torch._weights import Weight, weights_of

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
        # Of a dead object the copy is dead too: nothing else holds this set.
        return Weak, (set() if found is None else found,)


class Targets:
    """The weights of an optimizer that are centralized; changes of the model are followed."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, options: Options) -> None:
        self._optimizer: Callable[[], Any] = Weak(optimizer)
        self._model = model
        self._options = options
        self._decisions: dict[Tensor, Decision] = {}
        self._look: _Look | None = None
        self._uses = 0  # of `by_group`, which each step calls
        self._states = 0

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, which the handle of the user keeps."""
        optimizer: Optimizer = self._optimizer()
        return optimizer

    def by_group(self) -> list[tuple[Group, list[Weight]]]:
        """List the groups with something to centralize, each with its weights.

        It is the same list until something changes. Raises a RuntimeError if a parameter that can
        move is not, or no longer, in the model.
        """
        self._uses += 1
        look = self._look
        if look is None or not look.is_current(self._optimizer().param_groups):
            look = self._look_again()
        return look.found

    def weights(self) -> Iterator[Weight]:
        """List everything to centralize."""
        for _, weights in self.by_group():
            yield from weights

    def others(self) -> Iterator[Weight]:
        """List the weights of the model that are in no group that is switched on."""
        on = {p for g in self.optimizer.param_groups if is_on(g) for p in g["params"]}
        pairs = self._decisions.items()
        rest = [(p, d) for p, d in pairs if p not in on and p.shape == d.row.shape]
        return weights_of(rest, reproducible=self._options.reproducible)

    def plan(self) -> Plan:
        """Show the decision on each parameter of the optimizer, by the model as it is now."""
        self._look = None  # the rules of layers may have changed too
        held = {p: is_on(group) for group in self.optimizer.param_groups for p in group["params"]}
        rows = [(d.row, held[p]) for p, d in self._decide().items() if p in held]
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

    def _look_again(self) -> _Look:
        decisions, groups = self._decide(), self.optimizer.param_groups
        for parameter in chain.from_iterable(g["params"] for g in groups if is_on(g)):
            if decisions[parameter].holder is None and _can_move(parameter):
                raise RuntimeError(_why_missing(decisions[parameter].row))
        frozen = {d.row.name for p, d in self._decisions.items() if not p.requires_grad}
        held = {p for group in groups for p in group["params"]}
        for parameter in decisions.keys() - held:
            name = decisions[parameter].row.name
            if parameter.requires_grad and name in frozen:
                raise RuntimeError(_why_idle(name))
        self._look = look = _Look(self._model, groups, decisions, self._options.reproducible)
        self._decisions = decisions
        self.parameters = [*decisions]  # of the model, and all others of the optimizer
        return look

    def _decide(self) -> dict[Tensor, Decision]:
        """Look at the model as it is, and list parameters that are not in it too."""
        found = decide(self._model, self._options)
        for parameter in [p for group in self.optimizer.param_groups for p in group["params"]]:
            if parameter not in found:
                before = self._decisions.get(parameter)
                name = _NAMELESS if before is None else before.row.name
                row = PlanRow(name, tuple(parameter.shape), None, _STRANGER)
                found[parameter] = Decision(row, None, "")
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model that holds the handle has other parameters.
        return {**vars(self), "_look": None}


class _Look:
    """The weights of each group, and all that has to stay as it is for them to hold.

    Frozen parameters may be missing in the model: peft registers some anew in each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        decisions: Mapping[Tensor, Decision],
        reproducible: bool,
    ) -> None:
        self.found: list[tuple[Group, list[Weight]]] = []
        pairs = []
        for group in filter(is_on, groups):
            of_group = [(p, decisions[p]) for p in group["params"]]
            if weights := [*weights_of(of_group, reproducible=reproducible)]:
                self.found.append((group, weights))
            pairs += of_group
        held = [d for _, d in pairs if d.holder is not None]
        self._tables, self._keys = [_PARAMETERS(d.holder) for d in held], [d.key for d in held]
        self._layers = [*filter(len, map(_LAYERS, model.modules()))]
        self._missing = [p for p, d in pairs if d.holder is None]
        self._seen = self._see(groups)
        self._weights = [weight.parameter for _, weights in self.found for weight in weights]
        self._shapes = [*map(_SHAPE, self._weights)]

    def is_current(self, groups: Sequence[Group]) -> bool:
        """Return True if nothing has changed."""
        try:
            seen = self._see(groups)
        except KeyError:  # a parameter is gone
            return False
        return (
            len(seen) == len(self._seen)
            and all(map(is_, seen, self._seen))
            and [*map(_SHAPE, self._weights)] == self._shapes
        )

    def _see(self, groups: Sequence[Group]) -> list[object]:
        """List what may be replaced; each step does, so this makes no call for each parameter."""
        seen: list[object] = []
        for group in groups:
            seen += group, group.get(SWITCH, True)
            seen += group["params"]
        seen += map(getitem, self._tables, self._keys)
        seen += chain.from_iterable(map(_VALUES, self._layers))
        seen += map(_can_move, self._missing)
        return seen


_PARAMETERS, _LAYERS, _SHAPE = map(attrgetter, ("_parameters", "_modules", "shape"))
_VALUES = methodcaller("values")  # torch.jit has mappings of its own


def _can_move(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None


def is_on(group: Group) -> bool:
    """Return the switch of a parameter group; a TypeError if it is not a bool."""
    switch = group.get(SWITCH, True)
    if not isinstance(switch, bool):
        raise TypeError(f"{SWITCH!r} in a parameter group is True or False, not {switch!r}")
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
