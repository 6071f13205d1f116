"""Where another implementation and gcx mean the same, they give the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

import gcx.torch


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (partial(nn.Linear, 5, 3), (8, 5)),
        (partial(nn.Conv1d, 4, 3, 3), (2, 4, 7)),
        (partial(nn.Conv2d, 4, 6, 3, groups=2), (2, 4, 7, 7)),
    ],
    ids=["linear", "conv1d", "grouped-conv2d"],
)
def test_pytorch_optimizer(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    peer = pytest.importorskip("pytorch_optimizer.optimizer.gradient_centralization")
    torch.manual_seed(0)
    layer = make().double()
    layer(torch.rand(shape, dtype=torch.float64)).square().sum().backward()
    expected = layer.weight.grad.clone()
    peer.centralize_gradient(expected)
    assert not torch.equal(expected, layer.weight.grad)

    optimizer = torch.optim.SGD(layer.parameters())
    gcx.torch.centralize(optimizer, layer)
    optimizer.step()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-13, atol=1e-13)


def centered(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def test_decay_of_the_authors_adamw_is_divided_by_the_bias_correction(where: Any) -> None:
    layer = nn.Linear(5, 3, bias=False).double()
    w, m, v = layer.weight.detach().clone(), 0.0, 0.0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    gcx.torch.centralize(optimizer, layer, where=where)
    for t in range(1, 11):
        layer(torch.rand(8, 5).double()).square().sum().backward()
        g = centered(layer.weight.grad) if where == "gradient" else layer.weight.grad.clone()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = m / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + 0.1 * w
        w = w - 0.01 / (1 - 0.9**t) * (step if where == "gradient" else centered(step))
        optimizer.param_groups[0]["weight_decay"] = 0.1 / (1 - 0.9**t)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-12, atol=1e-12)


def test_sgdw_of_the_authors_shrinks_the_weights_apart() -> None:
    layer = nn.Linear(5, 3, bias=False).double()
    w, velocity = layer.weight.detach().clone(), 0.0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    gcx.torch.centralize(optimizer, layer)
    for _ in range(10):
        layer(torch.rand(8, 5).double()).square().sum().backward()
        velocity = 0.9 * velocity + centered(layer.weight.grad)
        w = w - 0.05 * velocity - 0.05 * 0.1 * w
        with torch.no_grad():
            layer.weight *= 1 - 0.05 * 0.1
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-12, atol=1e-12)
