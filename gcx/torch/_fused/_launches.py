"""The step of a parameter group by the kernels: one launch for each dtype."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from gcx.backends import _torch_cuda
from gcx.backends._torch_triton import forms
from gcx.torch._fused._rules import Rule, Scalars, State
from gcx.torch._optimizer import Group
from gcx.torch._weights import Weight

T = TypeVar("T")

# For each thing that a step needs (gradient, parameter, what is remembered) that of all.
Roles = Sequence[Sequence[Tensor]]
Weights = Sequence[Weight | None]  # of all parameters; None for those not to centralize

_PLAIN = (Tensor, Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lists of parameters whose tables are kept, where not the same ones have a gradient in each step.
_KEPT = 8


class Launches:
    """Steps by the kernels, with the tables that these need from step to step.

    Parameters
    ----------
    rule : Rule
        That of the optimizer.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._kept: dict[Hashable, _Tables] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies of an optimizer make their own: tables are on a device, and know addresses.
        return {"_rule": self._rule, "_kept": {}}

    def step(
        self, group: Group, parameters: Sequence[Tensor], states: Sequence[State], weights: Weights
    ) -> list[int]:
        """Make the step of these parameters, all of which have a gradient.

        Gradients of weights are centralized on the way, and stay what they are. Returns the
        positions of the parameters that are left to torch.
        """
        left: list[int] = []
        for stage, members in _positions(self._rule.stages(group, states)).items():
            if stage is None:
                left += members
                continue
            of_stage = (_at(members, whole) for whole in (parameters, states, weights))
            left += [members[k] for k in self._step_of_stage(group, stage, *of_stage)]
        return left

    def why_not(self, group: Group, parameter: Tensor, state: State, weight: Weight | None) -> str:
        """Tell why a parameter would be left to torch; nothing if it would not.

        A gradient or a state that is not there yet is taken to be like the parameter.
        """
        grad = parameter if parameter.grad is None else parameter.grad
        if not state:
            return _why_not([grad, parameter], weight)
        if None in self._rule.stages(group, [state]):
            return "what is remembered is of another optimizer, or the steps are counted on the GPU"
        memory = self._rule.memory(group, [state], [grad])
        return _why_not([grad, parameter, *(tensor for (tensor,) in memory)], weight)

    def _step_of_stage(
        self,
        group: Group,
        stage: Hashable,
        parameters: Sequence[Any],
        states: Sequence[Any],
        weights: Sequence[Any],
    ) -> list[int]:
        grads = [parameter.grad for parameter in parameters]
        memory = self._rule.memory(group, states, grads)
        roles = [grads, parameters, *memory]
        done = self._tables(roles, weights).run(roles, self._rule.scalars(group, stage))
        if done:
            self._rule.remember(_at(done, states), [_at(done, kept) for kept in memory])
        return sorted({*range(len(parameters))}.difference(done))

    def _tables(self, roles: Roles, weights: Weights) -> _Tables:
        key = (len(roles), *map(id, roles[1]))
        tables = self._kept.pop(key, None)  # those used last come last
        if tables is None or not tables.are_for(roles, weights):
            tables = _Tables(self._rule.name, roles, weights)
        self._kept[key] = tables
        if len(self._kept) > _KEPT:
            self._kept.pop(next(iter(self._kept)), None)  # unless another thread has done so
        return tables


class _Tables:
    """The launches for a list of parameters, and which of these are left to torch."""

    def __init__(self, rule: str, roles: Roles, weights: Weights) -> None:
        # Kept, so that the ids by which they are found stay theirs.
        self._parameters, self._memory, self._weights = roles[1], roles[2:], weights
        self._forms = [forms(tensors) for tensors in roles[:2]]
        places = _positions(list(map(_kind, zip(*roles, strict=True), weights)))
        self._left = places.pop(None, [])
        self._tables = [_Table(rule, each, roles, weights) for each in places.values()]

    def are_for(self, roles: Roles, weights: Weights) -> bool:
        """Tell whether these are for the same tensors, or gradients that are like them.

        The same tensor can change all of its properties, but what is remembered has no reason to.
        """
        return (
            all(map(is_, weights, self._weights))
            and all(all(map(is_, *pair)) for pair in zip(roles[2:], self._memory, strict=True))
            and [forms(tensors) for tensors in roles[:2]] == self._forms
            and all(_why_not([each[k] for each in roles], weights[k]) for k in self._left)
        )

    def run(self, roles: Roles, scalars: Scalars) -> list[int]:
        """Centralize and update; return the positions of what is done, in order."""
        return sorted(k for table in self._tables for k in table.run(roles, scalars))


class _Table:
    """What is updated in one launch: parameters of one device and dtype."""

    def __init__(self, rule: str, places: list[int], roles: Roles, weights: Weights) -> None:
        found = [weights[k] for k in places]
        self._places = places
        # Seen in another shape.
        self._in_groups = [(k, w.fan_in) for k, w in enumerate(found) if w and w.fan_in.groups > 1]
        self._kernel = _torch_cuda.MultiTensor(
            rule,
            self._select(roles),
            [() if weight is None else _axes(weight) for weight in found],
            any_order=not any(weight is not None and weight.reproducible for weight in found),
        )

    def run(self, roles: Roles, scalars: Scalars) -> list[int]:
        """Centralize and update; return the positions of all of it, or of nothing if not done."""
        return self._places if self._kernel.run(self._select(roles), **scalars) else []

    def _select(self, roles: Roles) -> list[list[Tensor]]:
        """Pick what the kernel updates, as it sees it."""
        selected = [list(_at(self._places, tensors)) for tensors in roles]
        for k, fan_in in self._in_groups:
            for tensors in selected:
                tensors[k] = fan_in.view(tensors[k])
        return selected


def _why_not(tensors: Sequence[Tensor], weight: Weight | None) -> str:
    """Tell why the kernels do not take a parameter; nothing if they do.

    `tensors` are those of its step: the gradient, the parameter, and what is remembered.
    """
    grad, parameter, *_ = tensors
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        return f"a parameter is a {type(parameter).__name__}, its gradient a {type(grad).__name__}"
    if grad.layout is not torch.strided:
        return f"a gradient is {grad.layout}"
    if parameter.dtype not in _DTYPES:
        return f"a parameter is {parameter.dtype}"
    if any(_form(tensor) != _form(parameter) for tensor in tensors):
        return "a gradient, or what is remembered, is in memory in another way than its parameter"
    axes = () if weight is None else _axes(weight)
    seen = [tensor if weight is None else weight.fan_in.view(tensor) for tensor in tensors]
    if not all(_torch_cuda.takes(tensor, axes, tensor) for tensor in seen):
        kind = f"{type(grad).__name__} of shape {tuple(grad.shape)}"
        return f"the kernels do not take a {kind} with strides {grad.stride()} on {grad.device}"
    return ""


def _kind(tensors: Sequence[Tensor], weight: Weight | None) -> Hashable:
    """Give what parameters of one launch have in common; None for those that are left to torch."""
    parameter = tensors[1]
    return None if _why_not(tensors, weight) else (parameter.device, parameter.dtype)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _axes(weight: Weight) -> tuple[int, ...]:
    return weight.fan_in.view_axes(weight.parameter)


def _positions(values: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """List for each value where it is."""
    everywhere = list(range(len(values)))
    if values and values.count(values[0]) == len(values):  # as a rule
        return {values[0]: everywhere}
    found: dict[Hashable, list[int]] = {}
    for k in everywhere:
        found.setdefault(values[k], []).append(k)
    return found


def _at(places: list[int], values: Sequence[T]) -> Sequence[T]:
    """Pick the values at some places, which are in order."""
    return values if len(places) == len(values) else [values[k] for k in places]
