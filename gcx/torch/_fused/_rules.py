"""How the steps of AdamW and SGD are put to the kernels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import sqrt
from struct import pack, unpack
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from gcx.torch._optimizer import Group

State = dict[str, Any]  # what an optimizer remembers of one parameter
Scalars = Mapping[str, float | bool]


class Rule(Protocol):
    """What the kernels need to know of an optimizer.

    Attributes
    ----------
    kind : type
        The optimizer.
    name : str
        Its name in `gcx.backends._torch_cuda`.
    fixed : mapping
        Options of a parameter group that must have this value.
    numbers : tuple of str
        Options that must be numbers and not tensors.
    """

    kind: type[Optimizer]
    name: str
    fixed: Mapping[str, object]
    numbers: tuple[str, ...]

    def stages(self, group: Group, states: Sequence[State], /) -> list[Hashable]:
        """Tell how far each parameter is: those of one stage share a launch, but None has none.

        A state is empty in an optimizer that remembers nothing.
        """

    def memory(
        self, group: Group, states: Sequence[State], grads: Sequence[Tensor], /
    ) -> list[list[Tensor]]:
        """List what is remembered, one list for each kind; what is not there yet is made."""

    def scalars(self, group: Group, stage: Any, /) -> Scalars:
        """Give what is the same for all elements."""

    def remember(self, states: Sequence[State], memory: Sequence[Sequence[Tensor]], /) -> None:
        """Bring the states up to date after a launch, but for what that has written to."""


# A way of torch's that the user asks for is the way it goes.
_OF_TORCH: Mapping[str, object] = {"differentiable": False, "foreach": None, "fused": None}


# What AdamW remembers of a parameter; a checkpoint of another optimizer may lack it.
_STATE = {"step", "exp_avg", "exp_avg_sq"}


class AdamWRule:
    """`torch.optim.AdamW`."""

    kind: type[Optimizer] = torch.optim.AdamW
    name = "adamw"
    fixed: Mapping[str, object] = {"amsgrad": False, "capturable": False, **_OF_TORCH}
    numbers: tuple[str, ...] = ("lr", "betas", "weight_decay", "eps")

    def stages(self, _: Group, states: Sequence[State], /) -> list[Hashable]:
        """See `Rule`: the steps so far. To read them from a GPU would be to wait for it."""
        return [
            state["step"].item() if state.keys() >= _STATE and state["step"].is_cpu else None
            for state in states
        ]

    def memory(
        self, _: Group, states: Sequence[State], _grads: Sequence[Tensor], /
    ) -> list[list[Tensor]]:
        """See `Rule`."""
        return [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]

    def scalars(self, group: Group, stage: float, /) -> Scalars:
        """See `Rule`; all in float32, as in the fused step of torch on CUDA."""
        lr, decay = _float32(group["lr"]), _float32(group["weight_decay"])
        beta1, beta2 = map(_float32, group["betas"])
        correction1, correction2 = (1 - _float32(beta ** (stage + 1)) for beta in (beta1, beta2))
        return {
            "step_size": _float32(lr / _float32(correction1)),
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "decay": _float32(lr * decay),
            "bias2_root": _float32(sqrt(_float32(correction2))),
            "maximize": group["maximize"],
        }

    def remember(self, states: Sequence[State], _: Sequence[Sequence[Tensor]], /) -> None:
        """See `Rule`."""
        # Of a number of Python a tensor would be made for each of them.
        one = torch.tensor(1.0, device="cpu")
        torch._foreach_add_([state["step"] for state in states], one, alpha=1.0)


class SGDRule:
    """`torch.optim.SGD`."""

    kind: type[Optimizer] = torch.optim.SGD
    name = "sgd"
    fixed: Mapping[str, object] = _OF_TORCH
    numbers: tuple[str, ...] = ("lr", "momentum", "dampening", "weight_decay")

    def stages(self, group: Group, states: Sequence[State], /) -> list[Hashable]:
        """See `Rule`: whether the momentum is still to come."""
        has_momentum = group["momentum"] != 0
        return [has_momentum and state.get("momentum_buffer") is None for state in states]

    def memory(
        self, group: Group, states: Sequence[State], grads: Sequence[Tensor], /
    ) -> list[list[Tensor]]:
        """See `Rule`."""
        if group["momentum"] == 0:
            return []
        buffers = [state.get("momentum_buffer") for state in states]
        pairs = zip(buffers, grads, strict=True)
        return [[torch.zeros_like(grad) if buffer is None else buffer for buffer, grad in pairs]]

    def scalars(self, group: Group, stage: bool, /) -> Scalars:
        """See `Rule`."""
        names = (*self.numbers, "nesterov", "maximize")
        return {"first": stage, **{name: group[name] for name in names}}

    def remember(self, states: Sequence[State], memory: Sequence[Sequence[Tensor]], /) -> None:
        """See `Rule`."""
        for buffers in memory:
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer


def _float32(number: float) -> float:
    (rounded,) = unpack("f", pack("f", number))
    return float(rounded)
