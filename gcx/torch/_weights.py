"""The weights to centralize, in an optimizer that may change at any time, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, compress
from operator import attrgetter, getitem, is_, is_not, methodcaller
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcx._decisions import refuse_empty
from gcx._memory import find_shared, overlap, repeats_itself
from gcx._names import naming
from gcx._options import Options
from gcx.backends import _torch
from gcx.backends._torch_memory import PLAIN, FanIn, count_bytes, find_memory
from gcx.plan import Plan, PlanRow
from gcx.torch._plan import HINT, Decision, decide

T = TypeVar("T")
Group = dict[str, Any]  # of parameters, in an optimizer

# Factor of the weight that an optimizer adds to its gradient; None if it adds nothing.
Rate = float | Tensor | None

# The key by which a parameter group switches Gradient Centralization off; it is on by default.
SWITCH = "centralize"
_NAMELESS = "?"  # a parameter that was never in the model
_SWITCHED_OFF = f"switched off: {SWITCH!r} is False in its parameter group"

# Advice for wrappers that flatten weights, or update them without a step.
IN_BACKWARD = "call gcx.torch.centralize_in_backward(model) before the model is wrapped"

_DENSE = torch.strided
_PARAMETER: Callable[[Weight], Tensor] = attrgetter("parameter")
_FAN_IN: Callable[[Weight], FanIn] = attrgetter("fan_in")
_PARAMETERS, _LAYERS, _SHAPE, _NBYTES, _GRAD, _GRADIENT, _LAYOUT = map(
    attrgetter,
    ("_parameters", "_modules", "shape", "nbytes", "grad", "parameter.grad", "layout"),
)
_is_there = partial(is_not, None)
_VALUES = methodcaller("values")  # torch.jit has mappings of its own


class Weight(NamedTuple):
    """A parameter to centralize, with its name in the model."""

    name: str
    parameter: Tensor
    fan_in: FanIn
    reproducible: bool = False

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor of the shape of the parameter over the fan-in, in float32 at least."""
        return _torch.mean_over(tensor, self.fan_in, self.reproducible)

    def subtract_(self, tensor: Tensor, mean: Tensor) -> None:
        """Subtract in place a mean that `mean` returned."""
        _torch.subtract_mean_(tensor, mean, self.fan_in)

    def check(self, tensor: Tensor) -> None:
        """Raise a TypeError that names the weight if the bits of a mean cannot be promised."""
        if self.reproducible:
            with naming(self.name):
                _torch.check_reproducible_over(tensor, self.fan_in)


def weights_of(
    decisions: Iterable[tuple[Tensor, Decision]], *, reproducible: bool
) -> Iterator[Weight]:
    """List the parameters to centralize; a TypeError if promised bits cannot be kept."""
    for parameter, decision in decisions:
        row = decision.row
        if row.layout is not None:
            weight = Weight(row.name, parameter, row.layout.split(row.shape), reproducible)
            weight.check(parameter)
            yield weight


class Weak(ref[T]):
    """A reference to an object that holds this, and is freed without the garbage collector.

    A copy of both refers to the copy.
    """

    def __reduce__(self) -> Any:
        found = self()
        # The copy of a dead one is dead too: this set goes at once.
        return Weak, (set() if found is None else found,)


class Targets:
    """The weights of an optimizer that are centralized; changes of the model are followed."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, options: Options) -> None:
        self.get_optimizer: Callable[[], Any] = Weak(optimizer)  # the user's handle keeps it
        self._model = model
        self._options = options
        self._decisions: dict[Tensor, Decision] = {}
        # The places of the parameters, and all that was there in the last look at the model.
        self._tables: Sequence[Any] = ()
        self._keys: Sequence[str] = ()
        self._layers: Sequence[Any] = ()
        self._missing: Sequence[Tensor] = ()
        self._seen: Sequence[object] = ()
        self._uses = self._states = 0  # calls of `by_group`, which each step makes

    def by_group(self) -> list[tuple[Group, list[Weight]]]:
        """List the groups with something to centralize, each with its weights.

        It is the same list until something changes. Raises a RuntimeError if a parameter that can
        move is not, or no longer, in the model.
        """
        self._uses += 1
        if not self._is_current():
            self._look()
        return self._found

    def weights(self) -> Iterator[Weight]:
        """List everything to centralize."""
        for _, weights in self.by_group():
            yield from weights

    def others(self) -> Iterator[Weight]:
        """List the weights of the model that are in no group that is switched on."""
        on = {p for g in self.get_optimizer().param_groups if is_on(g) for p in g["params"]}
        pairs = self._decisions.items()
        rest = [(p, d) for p, d in pairs if p not in on and p.shape == d.row.shape]
        return weights_of(rest, reproducible=self._options.reproducible)

    def plan(self) -> Plan:
        """Show the decision on each parameter of the optimizer, by the model as it is now."""
        self._seen = ()  # the rules of layers may have changed too
        held = {p: is_on(g) for g in self.get_optimizer().param_groups for p in g["params"]}
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
        if len(plan) and all(row.name == _NAMELESS for row in plan):
            raise RuntimeError(_why_missing(plan[0]))
        refuse_empty(plan, f"this {type(self.get_optimizer()).__name__}", hint=HINT)

    def were_bypassed(self) -> bool:
        """Return True if states are new since the last call, and the step did not make them."""
        uses, states = self._uses, self._states
        self._uses, self._states = 0, sum(map(bool, self.get_optimizer().state.values()))
        return not uses and self._states > states

    def _is_current(self) -> bool:
        """Return True if nothing has changed since the last look."""
        try:
            seen = self._see()
        except KeyError:  # a parameter is gone
            return False
        return (
            0 < len(seen) == len(self._seen)
            and all(map(is_, seen, self._seen))
            and [*map(_SHAPE, self._weights)] == self._shapes
        )

    def _see(self) -> list[object]:
        """List what may be replaced; each step does, so this makes no call for each parameter."""
        seen: list[object] = []
        for group in self.get_optimizer().param_groups:
            seen += group, group.get(SWITCH, True)
            seen += group["params"]
        seen += map(getitem, self._tables, self._keys)
        seen += chain.from_iterable(map(_VALUES, self._layers))
        seen += map(_can_move, self._missing)
        return seen

    def _look(self) -> None:
        """Find the weights of each group, and all that has to stay as it is for them to hold."""
        decisions, groups = self._decide(), self.get_optimizer().param_groups
        found: list[tuple[Group, list[Weight]]] = []
        on: list[tuple[Tensor, Decision]] = []
        for group in filter(is_on, groups):
            of_group = [(p, decisions[p]) for p in group["params"]]
            if weights := [*weights_of(of_group, reproducible=self._options.reproducible)]:
                found.append((group, weights))
            on += of_group
        # Frozen ones may be missing: peft registers some anew in each forward pass.
        missing = [parameter for parameter, decision in on if decision.holder is None]
        if gone := [*filter(_can_move, missing)]:
            raise RuntimeError(_why_missing(decisions[gone[0]].row))
        frozen = {d.row.name for p, d in self._decisions.items() if not p.requires_grad}
        for parameter in decisions.keys() - {p for group in groups for p in group["params"]}:
            name = decisions[parameter].row.name
            if parameter.requires_grad and name in frozen:
                raise RuntimeError(
                    f"{name} was frozen, and has been replaced by a parameter that can train, "
                    "which the optimizer does not hold; add it to the optimizer, or freeze it. If "
                    "another optimizer holds it, centralize this one anew"
                )
        held = [decision for _, decision in on if decision.holder is not None]
        self._tables, self._keys = [_PARAMETERS(d.holder) for d in held], [d.key for d in held]
        self._layers = [*filter(len, map(_LAYERS, self._model.modules()))]
        self._missing, self._decisions, self._found = missing, decisions, found
        self.parameters = [*decisions]  # of the model, and all others of the optimizer
        self._weights = [weight.parameter for _, weights in found for weight in weights]
        self._shapes = [*map(_SHAPE, self._weights)]
        self._seen = self._see()

    def _decide(self) -> dict[Tensor, Decision]:
        """Look at the model as it is, and list parameters that are not in it too."""
        found = decide(self._model, self._options)
        for parameter in [p for g in self.get_optimizer().param_groups for p in g["params"]]:
            if parameter not in found:
                before = self._decisions.get(parameter)
                name = _NAMELESS if before is None else before.row.name
                shape, reason = tuple(parameter.shape), "unknown: it is not in the model"
                found[parameter] = Decision(PlanRow(name, shape, None, reason), None, "")
        return found


def _can_move(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None


def is_on(group: Group) -> bool:
    """Return the switch of a parameter group; a TypeError if it is not a bool."""
    switch = group.get(SWITCH, True)
    if not isinstance(switch, bool):
        raise TypeError(f"{SWITCH!r} in a parameter group is True or False, not {switch!r}")
    return switch


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


def with_gradient(weights: Sequence[Weight]) -> tuple[Sequence[Weight], list[Tensor]]:
    """List the weights that have a gradient, and their gradients.

    Raises a TypeError if a gradient has no mean, or none with the bits that were promised.
    """
    grads = [*map(_GRADIENT, weights)]
    if not all(are_there := [*map(_is_there, grads)]):
        weights, grads = [*compress(weights, are_there)], [*compress(grads, are_there)]
    if {*map(_LAYOUT, grads)} != {_DENSE} or weights[0].reproducible:
        for weight, grad in zip(weights, grads, strict=True):
            if grad.layout is not _DENSE:
                raise TypeError(
                    f"{weight.name} has a gradient of layout {grad.layout}, which has no mean over "
                    "the fan-in; make it dense (sparse=False), or use where='update'"
                )
            weight.check(grad)
    return weights, grads


def part_gradients(weights: Iterable[Weight], parameters: Iterable[Tensor]) -> None:
    """Copy the gradient of a weight if it shares memory with another gradient, or a parameter."""
    marked = [*map(_PARAMETER, weights)]
    if _are_apart([*filter(_is_there, map(_GRAD, parameters))], marked):
        return
    dense = [(p, g) for p in parameters if (g := p.grad) is not None and g.layout is _DENSE]
    uses = [(find_memory(grad), k, True) for k, (_, grad) in enumerate(dense)]
    uses += [(find_memory(p), -1, False) for p in parameters if p.layout is _DENSE]
    shared = {dense[k] for pair in find_shared(uses) for k in pair if k >= 0}
    for parameter, grad in shared.intersection((p, p.grad) for p in marked):
        parameter.grad = grad.clone()


def _are_apart(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Return True if plain gradients begin far enough apart, and none where a weight does."""
    if not {*map(type, grads)}.issubset(PLAIN):
        return False
    try:
        starts = [*map(Tensor.data_ptr, grads)]
    except RuntimeError:  # one is sparse
        return False
    places = {*starts}
    if len(places) < len(starts) or not places.isdisjoint(map(Tensor.data_ptr, weights)):
        return False
    # Those that begin apart and overlap are parts of one storage.
    if not any(map(Tensor.storage_offset, grads)):
        return True
    count = _NBYTES if all(map(Tensor.is_contiguous, grads)) else count_bytes
    return not overlap(starts, map(count, grads))


def centralize_(
    weights: Sequence[Weight], grads: list[Tensor], rate: Rate, strength: float
) -> None:
    """Centralize gradients to which the optimizer adds `rate` times the weight, in one call."""
    if not grads:
        return
    fan_ins = tuple(map(_FAN_IN, weights))
    parameters = [] if rate is None else [*map(_PARAMETER, weights)]
    reproducible = weights[0].reproducible
    for k, grad in enumerate(grads):  # an expanded gradient cannot be written to
        if not grad.is_contiguous() and repeats_itself(grad.shape, grad.stride()):
            grads[k] = weights[k].parameter.grad = grad.contiguous()
    _torch.subtract_means_(
        grads, fan_ins, parameters, rate, strength=strength, reproducible=reproducible
    )
