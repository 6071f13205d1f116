"""Momentum from before gcx.torch.centralize: it is centralized too, or told."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import SGD, Adam, RMSprop

import gcx.torch

from torch_training import X, assert_means_kept, train


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_momentum_from_before_is_centralized(kind: Any, is_loaded: bool, layer: nn.Linear) -> None:
    key, options = ("momentum_buffer", {"momentum": 0.9}) if kind is SGD else ("exp_avg", {})
    optimizer, resumed = (kind(layer.parameters(), lr=0.01, **options) for _ in range(2))
    train(layer, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    call = partial(gcx.torch.centralize, optimizer, layer)
    if is_loaded:
        gcx.torch.centralize(optimizer := resumed, layer)
        call = partial(optimizer.load_state_dict, copy.deepcopy(saved))
    with pytest.warns(UserWarning, match=r"momentum of 1 weights \(weight") as caught:
        call()
    assert caught[0].filename == __file__
    momentum, of_bias = (saved["state"][k][key] for k in (0, 1))
    found, expected = optimizer.state[layer.weight][key], momentum - momentum.mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert torch.equal(optimizer.state[layer.bias][key], of_bias)
    gcx.torch.centralized(optimizer).remove()
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[layer.weight][key], momentum)


class Packed(Tensor):
    """As the states of low-bit optimizers: a tensor that has no mean."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "mean" in function.__name__:
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("pack", [Tensor.byte, Tensor.flatten, lambda x: x.as_subclass(Packed)])
def test_momentum_in_another_form_is_left_alone(pack: Any, layer: nn.Linear) -> None:
    """It does not keep a checkpoint from loading."""
    optimizer = SGD(layer.parameters(), momentum=0.9)
    state, whole = optimizer.state[layer.weight], torch.ones_like(layer.weight)
    state["momentum_buffer"] = packed = pack(whole)
    saved = optimizer.state_dict()
    for load in (
        lambda: gcx.torch.centralize(optimizer, layer),
        lambda: optimizer.load_state_dict(saved),
    )[: 2 if type(packed) is Packed else 1]:  # torch unpacks the others
        with pytest.warns(UserWarning, match=r"1 weights \(weight, .* form without a mean"):
            load()
        found = optimizer.state[layer.weight]["momentum_buffer"]
        assert type(found) is type(packed)
        assert torch.equal(found.as_subclass(Tensor), pack(whole).as_subclass(Tensor))


def test_momentum_of_bfloat16_is_told_from_rounding() -> None:
    """A mean of a few percent is not rounding, though an element has but eight bits."""
    layer = nn.Linear(512, 4).bfloat16()
    optimizer = SGD(layer.parameters(), momentum=0.9)
    momentum = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    momentum = (momentum - momentum.mean(1, keepdim=True)).bfloat16()
    for offset, match in ((0.1, "momentum of 1 weights"), (0.0, None)):
        optimizer.state[layer.weight]["momentum_buffer"] = (momentum + offset).bfloat16()
        with pytest.warns(UserWarning, match=match) if match else nullcontext():
            gcx.torch.centralize(optimizer, layer).remove()
        found = optimizer.state[layer.weight]["momentum_buffer"].float().mean(1).abs().max()
        assert found < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_memory_of_lbfgs_is_centralized(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(5, size, dtype=dtype) for size in (5, 3)))
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(X.to(dtype)) - 1).abs().square().sum()
        loss.backward()
        return loss

    def training() -> None:
        for _ in range(3):
            optimizer.step(closure)

    training()
    with pytest.warns(UserWarning, match=r"momentum of 2 weights \(0.weight"):
        gcx.torch.centralize(optimizer, model)
    assert_means_kept(model[0], lambda: assert_means_kept(model[1], training))


def test_momentum_of_what_is_no_gradient_stays(layer: nn.Linear) -> None:
    optimizer = RMSprop(layer.parameters(), momentum=0.9)
    train(layer, optimizer)
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    before = momentum.clone()
    gcx.torch.centralize(optimizer, layer)
    assert torch.equal(momentum, before)


def test_momentum_with_a_mean_of_decay_is_left_alone(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    train(layer, optimizer)
    before = optimizer.state[layer.weight]["momentum_buffer"].clone()
    gcx.torch.centralize(optimizer, layer, decay="outside")  # without a warning
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], before)
    with pytest.raises(ValueError, match=r"first call gcx\.torch\.centralized\(optimizer\)"):
        gcx.torch.centralize(optimizer, layer)
