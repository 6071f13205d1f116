"""Every way into gcx.torch, with the options of a mean, against NumPy unit by unit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.optim import SGD, AdamW

import gcx.torch

import processes
from canonical_order import output_units, rounded, scaled_mean
from same_bits import assert_same_bits
from sharded_training import whole
from torch_kernels import give_gradients, to_numpy
from torch_training import WAYS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPTIONS: list[Any] = [{"reproducible": True}, {"strength": 0.3}]
OPTIONS.append(OPTIONS[0] | OPTIONS[1])


class Model(nn.Module):
    """All the kinds of weights; fan-ins are long enough for orders to differ in bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(40, 6, 5)
        self.linear = nn.Linear(1000, 5)
        self.up = nn.ConvTranspose2d(60, 4, 5, groups=2)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def new_model(request: pytest.FixtureRequest) -> Callable[..., Model]:
    return partial(make_model, request.param)


def make_model(memory_format: Any, dtype: torch.dtype = torch.float32) -> Model:
    """Make a model with gradients."""
    torch.manual_seed(0)
    model = Model().to(dtype, memory_format=memory_format)
    give_gradients(0, model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_by_unit(
    model: Model, found: dict[str, Tensor], options: Any, compute: Any, *given: dict[str, Tensor]
) -> None:
    """Compare each unit of each weight; NumPy computes it from the same unit of other tensors."""
    rows = gcx.torch.plan(model)
    assert [row.layout is None for row in rows] == [False, True] * 3
    for row in rows[::2]:
        view, axes = row.layout.split(row.shape)
        units = [to_numpy(tensors[row.name]).reshape(view) for tensors in given]
        expected = np.empty_like(units[0])
        dtype = str(found[row.name].dtype).removeprefix("torch.")
        for unit in output_units(view, axes):
            expected[unit] = rounded(compute(*(x[unit] for x in units)), dtype)
        result = torch.from_numpy(expected.reshape(row.shape)).to(found[row.name].dtype)
        torch.testing.assert_close(found[row.name], result)
        if options.get("reproducible"):
            assert_same_bits(to_numpy(found[row.name]), to_numpy(result))


def by_closure(model: nn.Module, **options: Any) -> None:
    optimizer = SGD(model.parameters())
    gcx.torch.centralize(optimizer, model, **options)
    optimizer.step(lambda: give_gradients(0, model))


def by_fused(model: nn.Module, kind: Any = gcx.torch.SGD, **options: Any) -> None:
    kind(model, **options).step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "centralize", [*WAYS, by_closure, by_fused, partial(by_fused, kind=gcx.torch.AdamW)]
)
@pytest.mark.filterwarnings("ignore:.*rounding the weights loses:UserWarning")
def test_gradients(centralize: Any, dtype: torch.dtype, options: Any, new_model: Any) -> None:
    model = new_model(dtype)
    given, strength = gradients(model), options.get("strength", 1.0)
    with pytest.raises(ValueError, match="strength is the part of the mean to subtract"):
        centralize(model, strength=1.5)
    centralize(model, **options)
    assert_by_unit(model, gradients(model), options, lambda g: g - scaled_mean(g, strength), given)


@pytest.mark.parametrize("fan_in", [8, 9])
def test_equal_numbers_stay_equal(fan_in: int) -> None:
    """A vector of a CPU rounds as the numbers behind it do."""
    layer, numbers = nn.Linear(fan_in, 64), torch.randn(64, 1, generator=torch.Generator())
    layer.weight.grad = numbers.repeat(1, fan_in)
    alone = gcx.centralize(layer.weight.grad, strength=0.3)
    gcx.torch.centralize_grads_(layer, strength=0.3)
    for found in (alone, layer.weight.grad):
        assert torch.equal(found, found[:, :1].expand_as(found))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_decay_is_added_before_the_mean(maximize: bool, options: Any, new_model: Any) -> None:
    """The mean is that of ``grad + rate * weight`` in float32."""
    model = new_model()
    given, before, strength = gradients(model), weights(model), options.get("strength", 1.0)
    rate = np.float32(-0.1 if maximize else 0.1)
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1, maximize=maximize)
    gcx.torch.centralize(optimizer, model, **options)
    optimizer.step()

    def project(g: Any, w: Any) -> Any:
        return g - scaled_mean(g + rate * w, strength)

    assert_by_unit(model, gradients(model), options, project, given, before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("decay", "shrinkage"), [("inside", 1.0), ("outside", 1 - 0.1 * 0.2)])
def test_update_restores_the_mean(
    decay: Any, shrinkage: float, options: Any, new_model: Any
) -> None:
    model = new_model()
    plain, before = copy.deepcopy(model), weights(model)
    for one in (model, plain):
        optimizer = AdamW(one.parameters(), lr=0.1, weight_decay=0.2, foreach=False)
        if one is model:
            gcx.torch.centralize(optimizer, one, where="update", decay=decay, **options)
        give_gradients(0, one)
        optimizer.step()
    factor, strength = np.float32(shrinkage), np.float32(options.get("strength", 1.0))

    def restore(old: Any, new: Any) -> Any:
        moved = scaled_mean(new, 1.0) - factor * scaled_mean(old, 1.0)
        return new - strength * moved

    assert_by_unit(model, weights(model), options, restore, before, weights(plain))


@pytest.mark.filterwarnings("ignore:the momentum of 3 weights:UserWarning")
@pytest.mark.parametrize("reproducible", [True, False])
def test_memory_format_does_not_matter(reproducible: bool) -> None:
    """For momentum from before, and a closure that adds to the gradients; else it does matter."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = make_model(memory_format)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
        optimizer.step()
        gcx.torch.centralize(optimizer, model, reproducible=reproducible)
        optimizer.step()
        grads = [p.grad for p in model.parameters()]
        optimizer.step(partial(torch._foreach_add_, grads, 1.0))
        results.append([to_numpy(parameter) for parameter in model.parameters()])
    assert all(map(np.array_equal, *results)) == reproducible


@pytest.mark.parametrize("attach", WAYS)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": torch.complex64}, r"1\.weight: reproducible=True is for float16.*complex64"),
        ({"device": "meta"}, r"1\.weight: reproducible=True is for tensors on a CPU.*meta"),
    ],
    ids=["dtype", "device"],
)
def test_attaching_names_the_weight(attach: Any, options: Any, match: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2, **options))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(TypeError, match=match):
        attach(model, reproducible=True)
    assert torch.equal(model[0].weight.grad, torch.ones(2, 3))
    for parameter in model[1].parameters():  # what is left alone promises nothing
        parameter.requires_grad_(requires_grad=False)
    gcx.torch.centralize(SGD(model.parameters()), model)


def test_weight_that_comes_later(where: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2, dtype=torch.complex64))
    optimizer = SGD(model[0].parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, model, where=where, reproducible=True)
    optimizer.add_param_group({"params": model[1].parameters()})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(TypeError, match=r"1\.weight: reproducible=True"):
        optimizer.step()
    assert torch.equal(model[0].weight.grad, torch.ones(2, 3))
    assert all(map(torch.equal, before, model.parameters()))


def sharded_step(placement: Placement, where: str) -> tuple[Any, Any]:
    """Take a step of a weight (24, 1000), whole and cut; the weight afterwards, both ways."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    results = []
    for is_cut in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(1000, 24, bias=False)
        grad = torch.randn(24, 1000)
        if is_cut:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [placement]))
            grad = distribute_tensor(grad, mesh, [placement])
        optimizer = SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        gcx.torch.centralize(optimizer, layer, where=where, reproducible=True)
        layer.weight.grad = grad
        optimizer.step()
        results.append(to_numpy(whole(layer.weight.detach())))
    return results[0], results[1]


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_shards_of_whole_fan_ins(placement: Placement, where: str) -> None:
    for alone, cut in processes.run(2, sharded_step, placement, where):
        assert_same_bits(cut, alone)
