"""Trainings of a small convolutional network by gcx.torch.AdamW and SGD, with many options."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from gcx.torch import SGD, AdamW

STEPS = 6
DATA = torch.rand(8, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def new_model() -> nn.Sequential:
    """A weight of each kind of layout, biases and norms."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 6, 1, groups=2)
    first = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.BatchNorm2d(4)]
    return nn.Sequential(*first, up, nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)).double()


def loss_of(model: nn.Module) -> Tensor:
    return (model(DATA) - 1).square().mean()


def backward(model: nn.Module, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        backward(model, optimizer)
        optimizer.step()


def train_by_closure(model: nn.Module, optimizer: Optimizer) -> None:
    """As Lightning does in every step."""
    for _ in range(STEPS):
        assert isinstance(optimizer.step(partial(backward, model, optimizer)), Tensor)


def train_by_adding_closure(model: nn.Module, optimizer: Optimizer) -> None:
    """Adds to a gradient that is there, and clips the sum."""

    def closure() -> None:
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    for _ in range(STEPS):
        backward(model, optimizer)
        optimizer.step(closure)


def train_with_gaps(model: nn.Sequential, optimizer: Optimizer) -> None:
    """Not every weight has a gradient in each step."""
    for k in range(STEPS):
        backward(model, optimizer)
        if k % 2:
            model[3].weight.grad = model[6].bias.grad = None
        optimizer.step()


def train_scaled(model: nn.Module, optimizer: Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1, torch.inf, 1, 1):
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()


def train_by_schedule(model: nn.Module, optimizer: Optimizer) -> None:
    """Of the rate, and of momentum or betas."""
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    for _ in range(STEPS):
        train(model, optimizer, steps=1)
        scheduler.step()


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {}),
    "adamw-amsgrad": (AdamW, {"amsgrad": True}),
    "adamw-maximize": (AdamW, {"maximize": True, "weight_decay": 0.1}),
    "adamw-foreach": (AdamW, {"foreach": True}),
    "adamw-one-by-one": (AdamW, {"foreach": False}),
    "adamw-fused": (AdamW, {"fused": True}),
    "adamw-tensor": (AdamW, {"lr": torch.tensor(0.01), "fused": True}),
    "adamw-betas": (AdamW, {"betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.0}),
    "sgd": (SGD, {}),
    "sgd-decay": (SGD, {"weight_decay": 0.1}),
    "sgd-tensors": (SGD, {"lr": torch.tensor(0.01), "weight_decay": torch.tensor(0.1)}),
    "sgd-momentum": (SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd-nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd-maximize": (SGD, {"momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    "sgd-foreach": (SGD, {"momentum": 0.9, "foreach": True}),
    "sgd-fused": (SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "fused": True}),
}
TYPICAL = {"adamw": OPTIONS["adamw"], "sgd": OPTIONS["sgd-momentum"]}
TRAININGS: list[tuple[Callable[..., None], str]] = [
    *itertools.product((train, train_by_closure, train_by_adding_closure), OPTIONS),
    *itertools.product((train_with_gaps, train_by_schedule), TYPICAL),
    *itertools.product((train_scaled,), (*TYPICAL, "adamw-fused", "sgd-fused")),
]
