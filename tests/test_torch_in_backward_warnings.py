"""Weights whose gradients are not centralized in backward: users are warned."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import gcx.torch

from torch_training import SEQUENCES as X


@pytest.fixture
def watched() -> tuple[nn.Sequential, Any]:
    """Two layers, and the handle of both."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    return model, gcx.torch.centralize_in_backward(model)


def test_gradients_that_go_another_way_are_noticed(watched: Any) -> None:
    model, handle = watched
    idle = r"no gradient of 1 weights \(0\.weight, \.\.\.\) was there"
    for passed in range(1, 10):
        with pytest.warns(UserWarning, match=idle) if passed == 8 else nullcontext():
            model[1](X.float()).sum().backward()
            model(X.float())
    handle.remove()
    handle = gcx.torch.centralize_in_backward(model)
    model[1](X.float()).sum().backward()
    with pytest.warns(UserWarning, match=idle):  # at the end of a short training
        handle.remove()


def test_weights_that_change_without_a_gradient_are_noticed() -> None:
    """As where the loop estimates gradients by itself."""
    layer = nn.Linear(6, 6)
    gcx.torch.centralize_in_backward(layer)
    warns = pytest.warns(UserWarning, match="no gradient of this Linear")
    for k in range(10):  # it warns once
        with warns if k == 8 else nullcontext():
            layer(X.float())
        layer.weight.grad = torch.ones_like(layer.weight)
        SGD(layer.parameters(), lr=0.1).step()


@pytest.mark.parametrize("is_kept", [False, True])
def test_layer_that_is_replaced_is_noticed_once(is_kept: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = [*model] if is_kept else []
    gcx.torch.centralize_in_backward(model)
    for passed in range(12):
        if passed == 9:
            model[1] = nn.Linear(4, 4)
        message = r"the layer of 1\.weight was replaced"
        with pytest.warns(UserWarning, match=message) if passed == 9 else nullcontext():
            model(torch.rand(3, 4)).square().sum().backward()
    copy.deepcopy(model)
    kept.clear()


def test_passes_without_training_are_no_reason_to_warn(watched: Any) -> None:
    """A weight without a gradient so far may have one when training goes on."""
    model, handle = watched
    for has_begun in (False, True):
        if has_begun:
            model[1](X.float()).sum().backward()
        for _ in range(10):
            model.eval()(X.float())
            with torch.no_grad():
                model.train()(X.float())
    model(X.float()).sum().backward()
    handle.remove()


def test_frozen_weights_and_unrolled_cells_are_no_reason_to_warn(watched: Any) -> None:
    model, handle = watched
    model[0].requires_grad_(False)
    for _ in range(10):
        model(X.float()).sum().backward()
    handle.remove()
    cell, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), X.float()
    handle = gcx.torch.centralize_in_backward(cell)
    for _ in range(10):
        x = cell(x)
    x.sum().backward()
    handle.remove()
    gcx.torch.centralize_in_backward(cell).remove()
