"""The part of the mean that is subtracted, wherever gcx.torch centralizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import gcx
import gcx.torch

from torch_training import WAYS

STRENGTH = 0.3


def new_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Weights with a fan-in behind, before, and in groups; gradients with a mean."""
    torch.manual_seed(0)
    layers = (nn.Linear(5, 3), nn.ConvTranspose1d(4, 3, 2), nn.ConvTranspose1d(4, 6, 2, groups=2))
    model = nn.ModuleList(layers).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) + 0.5
    return model


def centralized(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plan = gcx.torch.plan(model)
    return gcx.centralize_many(tensors, layouts=plan, strength=STRENGTH)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def by_closure(model: nn.Module, **options: Any) -> None:
    optimizer = SGD(model.parameters())
    gcx.torch.centralize(optimizer, model, **options)
    given = gradients(model)

    def closure() -> float:
        for name, parameter in model.named_parameters():
            parameter.grad = given[name].clone()
        return 0.0

    optimizer.step(closure)


def fused_sgd(model: nn.Module, **options: Any) -> None:
    gcx.torch.SGD(model, **options).step()


def fused_adamw(model: nn.Module, **options: Any) -> None:
    gcx.torch.AdamW(model, **options).step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*rounding the weights loses:UserWarning")
@pytest.mark.parametrize("centralize", [*WAYS, by_closure, fused_sgd, fused_adamw])
def test_gradients(centralize: Any, dtype: torch.dtype) -> None:
    model = new_model(dtype)
    expected = centralized(model, gradients(model))
    with pytest.raises(ValueError, match="strength is the part of the mean to subtract"):
        centralize(model, strength=1.5)
    centralize(model, strength=STRENGTH)
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("reproducible", [False, True])
def test_coupled_decay_is_inside(reproducible: bool) -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.2)
    gcx.torch.centralize(optimizer, model, strength=STRENGTH, reproducible=reproducible)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    used = {name: grad + 0.2 * before[name] for name, grad in gradients(model).items()}
    expected = centralized(model, used)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * expected[name])


@pytest.mark.parametrize("decay", ["inside", "outside"])
def test_update(decay: Any) -> None:
    model = new_model()
    plain = copy.deepcopy(model)
    for one in (model, plain):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.2)
        if one is model:
            gcx.torch.centralize(optimizer, one, where="update", decay=decay, strength=STRENGTH)
        before = {name: p.detach().clone() for name, p in one.named_parameters()}
        for parameter, given in zip(one.parameters(), model.parameters(), strict=True):
            parameter.grad = given.grad.clone()
        optimizer.step()
    shrunk = {name: (1 - 0.02 * (decay == "outside")) * p for name, p in before.items()}
    moves = {name: p.detach() - shrunk[name] for name, p in plain.named_parameters()}
    for name, move in centralized(model, moves).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), shrunk[name] + move)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_momentum_is_left_alone(kind: Any) -> None:
    """The momentum of such a run has a mean, so a checkpoint of it must keep it."""
    options = {"momentum": 0.9} if kind is SGD else {}
    model = new_model()
    optimizer: Optimizer = kind(model.parameters(), **options)
    gcx.torch.centralize(optimizer, model, strength=STRENGTH)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict()["state"], saved["state"], rtol=0, atol=0)


def test_shown() -> None:
    model = new_model()
    handle = gcx.torch.centralize(SGD(model.parameters()), model, strength=STRENGTH)
    assert "where='gradient', strength=0.3, " in repr(handle)
    # Kernels do not take it.
    assert gcx.torch.AdamW(model, strength=STRENGTH).fallbacks == ["strength is 0.3"]
