"""Gradients that share memory with another tensor of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gcx.torch


class Named(Tensor):
    """A subclass of Tensor."""


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("layers", [(nn.Linear, nn.Linear), (nn.Linear, nn.Embedding)], ids=str)
@pytest.mark.parametrize(
    "shared",
    [
        lambda g: (g[:2], g[:2]),
        lambda g: (g[:2], g[1:3]),
        lambda g: (g[:2].as_subclass(Named),) * 2,
        lambda g: (g[:3:2], g[2:]),
        lambda g: (torch.view_as_complex(g.view(2, 2, 2)), g.view(2, 2, 2)[..., 1]),
    ],
    ids=["one", "overlapping", "subclass", "reaching", "imaginary part"],
)
def test_each_weight_gets_its_own_share_of_a_gradient(
    shared: Any, layers: tuple[Any, Any], weight_decay: float
) -> None:
    grads, decayed = shared(torch.arange(8.0).view(4, 2) ** 2), []
    model: Any = nn.ModuleList(
        [kind(2, 2, dtype=grad.dtype) for kind, grad in zip(layers, grads, strict=True)]
    )
    for layer, grad in zip(model, grads, strict=True):
        layer.weight.grad = grad
        expected = grad + weight_decay * layer.weight.detach()
        if isinstance(layer, nn.Linear):
            expected = expected - expected.mean(1, keepdim=True)
        decayed.append(layer.weight.detach() - expected)
    optimizer = SGD(model.parameters(), 1.0, weight_decay=weight_decay)
    gcx.torch.centralize(optimizer, model)
    optimizer.step()
    for layer, expected in zip(model, decayed, strict=True):
        torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("is_step", [True, False], ids=["step", "method"])
def test_gradient_of_a_parameter_of_another_optimizer_stays(is_step: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False))
    optimizer = SGD(model[0].parameters(), 1.0, weight_decay=0.5)
    handle = gcx.torch.centralize(optimizer, model)
    model[0].weight.grad = model[1].weight.grad = torch.tensor([[1.0, 3.0]])
    if is_step:
        optimizer.step()
    else:
        handle.centralize_grads_()
        assert torch.equal(model[0].weight.grad, torch.tensor([[-1.0, 1.0]]))
    assert torch.equal(model[1].weight.grad, torch.tensor([[1.0, 3.0]]))


def test_gradient_in_the_memory_of_its_weight() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = layer.weight.detach()
    weight = layer.weight.detach().clone()
    optimizer = SGD(layer.parameters(), 0.5)
    gcx.torch.centralize(optimizer, layer)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * (weight - weight.mean()))
