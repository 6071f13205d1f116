"""gcx.torch under the contract: the hooks, and the optimizers that centralize by themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import gcx.torch

from adapter import ADAM_RATE, MOMENTUM, RATE, STEPS, WEIGHTS, Adapter, Arrays, Kind, X, Y, start


class Net(nn.Module):
    """The network; its loss has the gradients that are `given`, if there are some."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 32), nn.Linear(32, 10)
        self.given: Arrays = {}
        self.to(getattr(torch, dtype))
        for name, array in start().items():
            self.of(name).data.copy_(torch.from_numpy(array))
        self.x, self.y = (torch.from_numpy(a).to(self.hidden.weight.dtype) for a in (X, Y))

    def of(self, name: str) -> Tensor:
        layer, _, bias = name.partition("_")
        return self.get_parameter(f"{layer}.{bias or 'weight'}")

    def loss(self) -> Tensor:
        if self.given:
            pairs = [(self.of(name), torch.from_numpy(g)) for name, g in self.given.items()]
            return torch.stack([(weight * grad).sum() for weight, grad in pairs]).sum()
        return (self.output(self.hidden(self.x).relu()) - self.y).square().mean()


class OfTorch(Adapter):
    names: ClassVar = {name: f"{name}.weight" for name in WEIGHTS}
    warns_of_momentum = True
    optimizers: ClassVar[Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    options: ClassVar[Any] = {"sgd": {"lr": RATE, "momentum": MOMENTUM}, "adam": {"lr": ADAM_RATE}}

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        self.kind, self.folder = kind, folder
        self.net = Net(dtype or self.dtype)
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers[self.kind](self.net.parameters(), **self.options[self.kind])

    def train(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.net.loss().backward()
            self.optimizer.step()

    def step(self, gradients: Arrays) -> None:
        self.net.given = gradients
        self.train(1)
        self.net.given = {}

    def parameters(self) -> Arrays:
        return {name: self.net.of(name).detach().double().numpy().copy() for name in start()}

    def resumed(self) -> OfTorch:
        other = type(self)(self.kind, self.folder)
        other.attach(**self.given)
        other.net.load_state_dict(self.net.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    __reduce_ex__ = object.__reduce_ex__


class Hooks(OfTorch):
    """gcx.torch.centralize."""

    name = "torch"
    lacks: ClassVar = {"test_copies_go_on_alike": "hooks do not go into a copy"}

    def attach(self, **options: Any) -> None:
        self.given = options
        self.handle = gcx.torch.centralize(self.optimizer, self.net, **options)


class Fused(OfTorch):
    """gcx.torch.SGD and AdamW, in place of torch's."""

    name = "fused"
    optimizers: ClassVar = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}
    fused: ClassVar[Any] = {"sgd": gcx.torch.SGD, "adam": gcx.torch.AdamW}
    options: ClassVar = {
        "sgd": {"lr": RATE, "momentum": MOMENTUM},
        "adam": {"lr": ADAM_RATE, "weight_decay": 0.0},
    }
    lacks: ClassVar = {
        "update": "one pass over the gradient, before the step",
        "where": "the gradient alone",
        "decay": "torch's own: coupled in SGD, apart from the gradient in AdamW",
        "test_remove": "an optimizer, not something attached to one",
        "test_momentum_from_before": "a checkpoint has it, in the tests of these optimizers",
        "test_copies_are_plain_and_warn": "a copy centralizes",
        "test_narrow_weights_warn": "no rounding of weights hides a centralized gradient",
    }

    def attach(self, where: str = "gradient", **options: Any) -> None:
        if isinstance(self.optimizer, self.fused[self.kind]):
            gcx.torch.centralize(self.optimizer, self.net, **options)
        if self.optimizer.state or where != "gradient":
            raise NotImplementedError
        self.given = options
        self.optimizer = self.fused[self.kind](self.net, **self.options[self.kind], **options)

    def plan(self) -> Any:
        return self.optimizer.plan


class OfTrainer(OfTorch):
    """A trainer with a callback: one run after another, each from the checkpoint before."""

    callback: ClassVar[Any]
    names: ClassVar = {name: f"net.{in_net}" for name, in_net in OfTorch.names.items()}
    lacks: ClassVar = {"test_copies_are_plain_and_warn": "a callback attaches itself again"}

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        super().__init__(kind, folder, dtype)
        self.callbacks: list[Any] = []
        self.done, self.checkpoint = 0, None

    def attach(self, **options: Any) -> None:
        self.callbacks.append(self.callback(**options))

    def remove(self) -> None:
        self.callbacks.clear()

    def resumed(self) -> OfTrainer:
        other = type(self)(self.kind, self.folder / "resumed")
        other.callbacks = self.callbacks
        other.done, other.checkpoint = self.done, self.checkpoint
        return other


ROWS = [Hooks, Fused]
