"""A small training in torch, in float64, so that rounding is told from a mean that moves."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import gcx.torch
from gcx.testing import assert_centralized

# Weights of size 1 in float64 after some steps: means are kept to rounding.
RTOL = 1e-9
X = torch.rand(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DECAYED = {"momentum": 0.9, "weight_decay": 0.1}
GRAD = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
SEQUENCES = torch.rand(8, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def new_layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3).double()


def deeper(layer: nn.Linear) -> nn.Sequential:
    """A network that ends in the layer."""
    return nn.Sequential(nn.Linear(5, 5).double(), nn.Tanh(), layer)


def loss_of(layer: nn.Module, x: Tensor = X) -> Tensor:
    return (layer(x) - 1).abs().square().sum()


def backward(model: nn.Module, optimizer: Optimizer, x: Tensor = X) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    return loss


def train(layer: nn.Module, optimizer: Optimizer, steps: int = 5, x: Tensor = X) -> None:
    for _ in range(steps):
        backward(layer, optimizer, x)
        optimizer.step()


def change_of(weight: nn.Linear | Tensor, training: Callable[[], object]) -> Tensor:
    """By how much a training moves a weight; a training that does not move it is an error."""
    weight = weight.weight if isinstance(weight, nn.Linear) else weight
    start = weight.detach().clone()
    training()
    change = weight.detach() - start
    assert change.abs().max() > 1e-5
    return change


def keeps_means(weight: nn.Linear | Tensor, training: Callable[[], object]) -> bool:
    change = change_of(weight, training)
    return bool(change.mean(1).abs().max() < RTOL * change.abs().max())


def assert_means_kept(weight: nn.Linear | Tensor, training: Callable[[], object]) -> None:
    """Corollary 4.1."""
    assert_centralized(change_of(weight, training), rtol=RTOL)


def attached(
    model: nn.Module, where: Any = "gradient", kind: Any = SGD, decay: Any = None, **options: Any
) -> Any:
    """An optimizer of a model, with Gradient Centralization."""
    optimizer = kind(model.parameters(), **{"lr": 0.01, **options})
    gcx.torch.centralize(optimizer, model, where=where, decay=decay)
    return optimizer


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Two roundings apart: the same steps, summed in another order."""
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


WITH_DECAY = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and "weight_decay" in signature(kind).parameters
}


class Own(Optimizer):
    """Not one of torch's: adds weight decay to the gradient."""

    def __init__(self, params: Any, **options: float) -> None:
        super().__init__(params, {"lr": 0.01, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad + group.get("weight_decay", 0) * p))


# The ways to centralize the gradients of a model


def by_step(model: nn.Module, **options: Any) -> None:
    optimizer = SGD(model.parameters())
    gcx.torch.centralize(optimizer, model, **options)
    optimizer.step()


def by_handle(model: nn.Module, **options: Any) -> None:
    handle = gcx.torch.centralize(SGD(model.parameters()), model, where="update", **options)
    handle.centralize_grads_()


def now(model: nn.Module, **options: Any) -> None:
    gcx.torch.centralize_grads_(model, **options)


def in_backward(model: nn.Module, **options: Any) -> None:
    gcx.torch.centralize_in_backward(model, **options)
    pairs = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.zero_grad()
    # Whose gradients are these.
    sum((parameter * grad).sum() for parameter, grad in pairs).backward()


WAYS = [by_step, by_handle, now, in_backward]
