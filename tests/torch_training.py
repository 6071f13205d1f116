"""A small training in torch, in float64, so that rounding is told from a mean that moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Weights of size 1 in float64 after some steps: means are kept to rounding.
RTOL = 1e-9
X = torch.rand(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GRAD = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def new_layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3).double()


def loss_of(layer: nn.Module, x: Tensor = X) -> Tensor:
    return (layer(x) - 1).square().sum()


def train(layer: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(layer).backward()
        optimizer.step()


def change_of(weight: nn.Linear | Tensor, training: Callable[[], object]) -> Tensor:
    """By how much a training moves a weight; a training that does not move it is an error."""
    weight = weight.weight if isinstance(weight, nn.Linear) else weight
    start = weight.detach().clone()
    training()
    change = weight.detach() - start
    assert change.abs().max() > 1e-5
    return change
