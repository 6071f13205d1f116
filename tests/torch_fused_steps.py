"""Steps of gcx.torch.AdamW and SGD beside those of torch's optimizers, with kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import gcx.torch
from gcx.torch import _fused
from gcx.torch._fused import SGD, AdamW

from torch_kernels import Device, give_gradients

STEPS = 6
BASES: dict[Any, Any] = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}

ADAMW = {"lr": 2**-10, "betas": (1 - 2**-3, 1 - 2**-5), "eps": 2**-27, "weight_decay": 2**-6}
MOMENTUM = {"lr": 2**-10, "momentum": 1 - 2**-3, "weight_decay": 2**-4}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, ADAMW),
    "adamw-maximize": (AdamW, {**ADAMW, "maximize": True, "weight_decay": 0.0}),
    "sgd": (SGD, {"lr": 2**-10}),
    "sgd-decay": (SGD, {"lr": 2**-10, "weight_decay": 2**-4, "maximize": True}),
    "momentum": (SGD, {**MOMENTUM, "dampening": 2**-3}),
    "nesterov": (SGD, {**MOMENTUM, "nesterov": True, "maximize": True}),
}
TYPICAL = ("adamw", "momentum")

Pair = tuple[Any, Any]  # a model and its optimizer


class Net(nn.Module):
    """Fan-ins that are rows and columns, beside biases and norms.

    A fan-in of the transposed convolution `down` is one column, or `runs` of neighbours.
    """

    def __init__(self, head: torch.dtype = torch.float32, *, runs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 1, groups=2)
        self.down = nn.ConvTranspose1d(5, 7, runs)
        self.head = nn.Linear(70, 3, dtype=head)


def new_net(device: Device, **options: Any) -> Any:
    return Net().to(device.type, **options)


def hooked(model: nn.Module, kind: Any, groups: Any = None, **options: Any) -> Optimizer:
    """Make torch's optimizer, with the hooks."""
    optimizer = BASES[kind](groups or model.parameters(), **options)
    gcx.torch.centralize(optimizer, model)
    return optimizer


def both(case: str, model: nn.Module, groups: Any = None, **options: Any) -> tuple[Pair, Pair]:
    """Make ours, and torch's with further options and the hooks."""
    kind, of_case = CASES[case]
    groups = groups or (lambda model: model.parameters())
    twin = copy.deepcopy(model)
    reference = hooked(twin, kind, groups(twin), **of_case, **options)
    return (model, kind(groups(model), model=model, **of_case)), (twin, reference)


def step(k: int, model: nn.Module, optimizer: Optimizer) -> None:
    give_gradients(k, model)
    optimizer.step()


def step_by_closure(k: int, model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.step(lambda: give_gradients(k, model))


def train(
    steps: Iterable[int], *pairs: Pair, training: Callable[[int, Any, Any], None] = step
) -> None:
    for k in steps:
        for pair in pairs:
            training(k, *pair)


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    """Some roundings of float32 apart, and of bfloat16 where that is the dtype."""
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        epsilon = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=32 * epsilon, atol=8 * epsilon)


def assert_close_states(found: Optimizer, expected: Optimizer) -> None:
    one, other = found.state_dict(), expected.state_dict()
    for group in (*one["param_groups"], *other["param_groups"]):
        group["fused"] = group["foreach"] = None  # ours is both in its own way
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=1e-4, atol=1e-6)


def make_device(name: str, patch: pytest.MonkeyPatch) -> Device:
    """Make a device on which the optimizers find kernels; on a CPU, the hooks do not."""
    device = Device(name, patch)
    if device.type == "cpu":
        patch.setattr(_fused, "is_for_kernels", lambda _: True)
    return device
