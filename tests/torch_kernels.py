"""The kernels of the fused optimizers in torch's own operations, for tests of what calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gcx.backends import _torch_cuda
from gcx.torch import _fused_step

Roles = Sequence[Sequence[Tensor]]
Runs = list[tuple[str, int]]  # rule, and number of parameters


class MultiTensor:
    """As `gcx.backends._torch_cuda.MultiTensor`, on any device; keeps a list of what it has run."""

    runs: ClassVar[Runs] = []
    refused: ClassVar[set[torch.dtype]] = set()  # as where a CUDA graph is captured too early

    def __init__(
        self, rule: str, roles: Roles, axes: Sequence[tuple[int, ...]], *, any_order: bool
    ) -> None:
        assert len({tensor.dtype for tensors in roles for tensor in tensors}) == 1
        self._rule, self._axes = rule, axes
        self._strides = _strides(roles)

    def fits(self, roles: Roles) -> bool:
        return _strides(roles) == self._strides

    def run(self, roles: Roles, **scalars: Any) -> bool:
        assert self.fits(roles)
        if roles[0][0].dtype in self.refused:
            return False
        self.runs.append((self._rule, len(self._axes)))
        for axes, *tensors in zip(self._axes, *roles, strict=True):
            RULES[self._rule](axes, *tensors, **scalars)
        return True


def replace_kernels(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Let the optimizers take the way of the kernels on a CPU; returns the list of what has run."""
    monkeypatch.setattr(_fused_step, "is_for_kernels", lambda _: True)
    monkeypatch.setattr(_torch_cuda, "why_not", lambda _: "")
    monkeypatch.setattr(_torch_cuda, "takes", lambda *_: True)
    monkeypatch.setattr(_torch_cuda, "MultiTensor", MultiTensor)
    monkeypatch.setattr(MultiTensor, "runs", runs := [])
    monkeypatch.setattr(MultiTensor, "refused", set())
    return runs


def _strides(roles: Roles) -> list[list[tuple[int, ...]]]:
    return [[tensor.stride() for tensor in tensors] for tensors in roles]


def _centralized(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x - x.mean(axes, keepdim=True) if axes else x


def _sgd(
    axes: tuple[int, ...],
    grad: Tensor,
    weight: Tensor,
    buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    grad = _centralized((-grad if maximize else grad) + weight_decay * weight, axes)
    if buffer is not None:
        buffer.copy_(grad if first else momentum * buffer + (1 - dampening) * grad)
        grad = grad + momentum * buffer if nesterov else buffer
    weight.sub_(lr * grad)


def _adamw(
    axes: tuple[int, ...],
    grad: Tensor,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    bias2_root: float,
    maximize: bool,
) -> None:
    grad = _centralized(-grad if maximize else grad, axes)
    weight.sub_(decay * weight)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / bias2_root + eps))


RULES: dict[str, Any] = {"sgd": _sgd, "adamw": _adamw}
