"""Equal bits through every way into gcx.torch, whatever the strides; the reference is NumPy's."""

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

import canonical_order
import processes
from same_bits import assert_same_bits
from sharded_training import whole
from torch_training import WAYS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Model(nn.Module):
    """All the kinds of weights; fan-ins are long enough for orders to differ in bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(40, 6, 5)
        self.linear = nn.Linear(1000, 5)
        self.up = nn.ConvTranspose2d(60, 4, 5, groups=2)


def new_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def random_gradients(model: nn.Module, seed: int = 0) -> None:
    """Set gradients to numbers that depend on nothing but the seed, in the strides of the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        grad = 0.3 + torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(grad)


def weights(model: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
    """List the weights, with the shape in which the layout sees them, and their fan-in axes."""
    found = {}
    for row in gcx.torch.plan(model):
        if row.layout is not None:
            parameter = model.get_parameter(row.name)
            found[row.name] = (parameter, *row.layout.split(row.shape))
    assert [len(view) for _, view, _ in found.values()] == [4, 2, 5]
    return found


def numbers(tensor: Tensor) -> Any:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(wide).contiguous().numpy()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def by_reference(model: nn.Module) -> dict[str, Any]:
    """Centralize the gradients of a model, outside of gcx."""
    expected = {}
    for name, (parameter, view, axes) in weights(model).items():
        grad = numbers(parameter.grad).reshape(view)
        result = canonical_order.centralized(grad, axes, name_of(parameter.dtype))
        expected[name] = result.reshape(parameter.shape)
    return expected


STRIDES: dict[str, Callable[[Model], Model]] = {
    "contiguous": lambda model: model,
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
}


def by_unit(model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], compute: Any) -> Any:
    """Compute the numbers of each output unit of each weight from those of two tensors."""
    for name, (parameter, view, axes) in weights(model).items():
        one, other = (numbers(x).reshape(view) for x in pairs[name])
        result = np.empty_like(one)
        for unit in canonical_order.output_units(view, axes):
            result[unit] = compute(one[unit], other[unit])
        yield name, result.reshape(parameter.shape)


def mean(unit: Any) -> Any:
    return canonical_order.scaled_mean(unit, 1.0)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("centralize", WAYS)
@pytest.mark.filterwarnings("ignore:.*rounding the weights loses:UserWarning")
def test_gradients_have_the_canonical_bits(
    centralize: Callable[..., None], dtype: torch.dtype, strides: str
) -> None:
    model = STRIDES[strides](new_model(dtype))
    random_gradients(model)
    expected = by_reference(model)
    centralize(model, reproducible=True)
    for name, grad in expected.items():
        assert_same_bits(numbers(model.get_parameter(name).grad), grad)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("maximize", [False, True])
def test_decay_is_added_before_the_mean(maximize: bool, strides: str) -> None:
    """The mean is that of ``grad + rate * weight`` in float32."""
    model = STRIDES[strides](new_model())
    random_gradients(model)
    rate = np.float32(-0.1 if maximize else 0.1)
    pairs = {name: (p.grad.clone(), p.detach().clone()) for name, p in model.named_parameters()}
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1, maximize=maximize)
    gcx.torch.centralize(optimizer, model, reproducible=True)
    optimizer.step()
    for name, expected in by_unit(model, pairs, lambda g, w: g - mean(g + rate * w)):
        assert_same_bits(numbers(model.get_parameter(name).grad), expected)


@pytest.mark.parametrize("strides", STRIDES)
def test_update_restores_the_canonical_mean(strides: str) -> None:
    model = STRIDES[strides](new_model())
    random_gradients(model)
    plain, start = copy.deepcopy(model), copy.deepcopy(model)
    for one in (model, plain):
        optimizer = AdamW(one.parameters(), lr=0.1, foreach=False)
        if one is model:
            gcx.torch.centralize(optimizer, one, where="update", reproducible=True)
        for parameter, given in zip(one.parameters(), model.parameters(), strict=True):
            parameter.grad = given.grad.clone()
        optimizer.step()
    pairs = {name: (p, plain.get_parameter(name)) for name, p in start.named_parameters()}
    for name, expected in by_unit(model, pairs, lambda old, new: new - (mean(new) - mean(old))):
        assert_same_bits(numbers(model.get_parameter(name)), expected)


sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
adamw = partial(AdamW, lr=0.1, foreach=False)


def run(model: Model, make: Any, **options: Any) -> list[Any]:
    """Train on recorded gradients, the first ones without centralization."""
    optimizer = make(model.parameters())
    random_gradients(model, seed=100)
    optimizer.step()
    gcx.torch.centralize(optimizer, model, **options)  # and momentum from before
    for seed in range(3):
        random_gradients(model, seed)
        optimizer.step()
    # A closure that adds to the gradients finds them as they were.
    generator = torch.Generator().manual_seed(200)
    more = [torch.randn(p.shape, generator=generator) for p in model.parameters()]

    def closure() -> None:
        for parameter, grad in zip(model.parameters(), more, strict=True):
            parameter.grad += grad

    optimizer.step(closure)
    return [numbers(parameter) for parameter in model.parameters()]


@pytest.mark.filterwarnings("ignore:the momentum of 3 weights:UserWarning")
@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize(
    ("make", "where"), [(sgd, "gradient"), (adamw, "gradient"), (adamw, "update")]
)
def test_memory_format_does_not_matter(make: Any, where: Any, reproducible: bool) -> None:
    """Unless reproducible bits are not asked for, or this could not fail."""
    one, other = (
        run(strides(new_model()), make, where=where, reproducible=reproducible)
        for strides in STRIDES.values()
    )
    assert all(map(np.array_equal, one, other)) == reproducible


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
        optimizer = sgd(layer.parameters())
        gcx.torch.centralize(optimizer, layer, where=where, reproducible=True)
        layer.weight.grad = grad
        optimizer.step()
        results.append(numbers(whole(layer.weight.detach())))
    return results[0], results[1]


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_shards_of_whole_fan_ins(placement: Placement, where: str) -> None:
    for alone, cut in processes.run(2, sharded_step, placement, where):
        assert_same_bits(cut, alone)


def refusal() -> str:
    with pytest.raises(TypeError) as caught:
        sharded_step(Shard(1), "gradient")
    return str(caught.value)


def test_a_fan_in_that_is_cut_is_refused() -> None:
    for message in processes.run(2, refusal):
        assert message.startswith("weight: reproducible=True needs each fan-in whole")
