"""The hooks of gcx.torch with kernels: few launches, no waiting, and right results."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim import SGD, AdamW, Optimizer

import gcx.torch

import processes
from torch_kernels import Device, everywhere, give_gradients, make_device, new_net, on_gpu

LAUNCHES = 2  # of a step: of rows and of columns
DECAY = {"weight_decay": 0.1}


def sgd(model: nn.Module, **options: Any) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, **options)


def centralized(weight: Tensor) -> Tensor:
    return weight - weight.mean(1, keepdim=True)


def added_by_hooks(device: Device, model: nn.Module, optimizer: Optimizer, **options: Any) -> int:
    """Count the launches of a step, or the kernels on a GPU; hooks may add no other work."""
    give_gradients(0, model)
    optimizer.step()
    plain = on_gpu(optimizer.step) if device.type == "cuda" else None
    with pytest.warns(UserWarning, match="momentum"):  # of the steps before
        gcx.torch.centralize(optimizer, model, **options)
    optimizer.step()
    if plain is not None:
        added = on_gpu(optimizer.step) - plain
        assert [*added] == ["gcx_kernel"]
        return added["gcx_kernel"]
    first = device.launches
    optimizer.step()
    assert device.launches == 2 * first
    return first


@everywhere
@pytest.mark.parametrize("reproducible", [False, True])
def test_launches_of_a_step(reproducible: bool, device: Device) -> None:
    model = new_net(device)
    found = added_by_hooks(device, model, sgd(model), reproducible=reproducible)
    assert found == LAUNCHES


@everywhere
def test_launches_for_each_dtype_and_rate_of_decay(device: Device) -> None:
    model = nn.ModuleList([new_net(device), new_net(device).bfloat16(), new_net(device)])
    groups = [{"params": part.parameters()} for part in model]
    groups[2]["weight_decay"] = 0.2
    optimizer = SGD(groups, lr=1e-3, momentum=0.9, weight_decay=0.1)
    assert added_by_hooks(device, model, optimizer) == 3 * LAUNCHES


def test_groups_of_one_rate_are_launched_together(device: Device) -> None:
    model = new_net(device)
    groups = [{"params": [p], "lr": 0.01 * k} for k, p in enumerate(model.parameters())]
    optimizer = SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)
    assert added_by_hooks(device, model, optimizer) == LAUNCHES


def test_rate_in_a_tensor_is_not_waited_for(device: Device) -> None:
    """As a GradScaler sets it, while the gradients are still scaled."""
    model = new_net(device)
    still = type("Still", (Optimizer,), {"step": lambda self: None})
    optimizer = still(model.parameters(), {"weight_decay": 0.5})
    gcx.torch.centralize(optimizer, model, decay="inside")
    give_gradients(0, model)
    grad, weight = model.head.weight.grad.clone(), model.head.weight.detach()
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    assert device.launches == 0
    expected = grad - (grad + 4 * weight).mean(1, keepdim=True)
    torch.testing.assert_close(model.head.weight.grad, expected)


def test_torch_centralizes_what_the_kernels_do_not_take(device: Device) -> None:
    class Marked(Tensor):
        """A type of tensor that may do anything."""

    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(4)])
    model.append(up := nn.ConvTranspose2d(4, 4, 2, bias=False))  # with a fan-in in pieces
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
    rows = torch.rand(4, 4)
    grads = [rows, rows * (1 + 2j), rows[0].expand(4, 4), (rows + 1).as_subclass(Marked)]
    expected = [centralized(grad).as_subclass(Tensor) for grad in grads]
    grads.append(torch.rand_like(up.weight))
    expected.append(grads[-1] - grads[-1].mean((0, 2, 3), keepdim=True))
    for layer, grad in zip(model, grads, strict=True):
        layer.weight.grad = grad.clone() if grad.stride(0) else grad
    gcx.torch.centralize_grads_(model)
    assert device.runs == [("Store", 2)]  # with a copy of the expanded gradient
    for layer, grad in zip(model, expected, strict=True):
        torch.testing.assert_close(layer.weight.grad.as_subclass(Tensor), grad)


def test_gradients_now(where: Any, device: Device) -> None:
    model = new_net(device)
    handle = gcx.torch.centralize(AdamW(model.parameters()), model, where=where)
    for centralize in (handle.centralize_grads_, partial(gcx.torch.centralize_grads_, model)):
        before = device.launches
        give_gradients(0, model)
        expected = centralized(model.head.weight.grad)
        centralize()
        assert device.launches == before + LAUNCHES
        torch.testing.assert_close(model.head.weight.grad, expected)


@pytest.mark.parametrize(("name", "error"), [("grad", TypeError), ("data", RuntimeError)])
def test_errors_come_before_the_launch(name: str, error: type[Exception], device: Device) -> None:
    model = new_net(device)
    gcx.torch.centralize(optimizer := sgd(model), model)
    for is_spoiled in (False, True):  # in the first step, and in one like the last
        give_gradients(0, model)
        before = model.conv.weight.grad.clone()
        if is_spoiled and name == "grad":
            model.head.weight.grad = model.head.weight.grad.to_sparse()
        elif is_spoiled:
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        with pytest.raises(error, match=r"head\.weight") if is_spoiled else nullcontext():
            optimizer.step()
    assert torch.equal(model.conv.weight.grad, before)
    assert device.launches == LAUNCHES


@everywhere
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("options", [{}, DECAY, {**DECAY, "maximize": True}])
def test_gradients(
    options: Any, reproducible: bool, dtype: torch.dtype, memory_format: Any, device: Device
) -> None:
    """They are those of torch's own operations on a CPU; if reproducible, to the last bit."""
    model = new_net(device).to(dtype, memory_format=memory_format)
    on_cpu = new_net(device).to("cpu", dtype)
    give_gradients(0, model, on_cpu)
    with pytest.MonkeyPatch.context() as patch:
        for net in (model, on_cpu):
            optimizer = SGD(net.parameters(), lr=0.0, **options)
            gcx.torch.centralize(optimizer, net, reproducible=reproducible)
            optimizer.step()
            assert device.launches == LAUNCHES
            patch.setattr(Tensor, "is_cuda", False)
    tolerance = 0.0 if reproducible else 4 * torch.finfo(dtype).eps
    for found, expected in zip(model.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(
            found.grad.cpu(), expected.grad, rtol=tolerance, atol=tolerance, check_stride=False
        )


def launch_parts() -> None:
    """Launch the parts of DTensors whose fan-ins are whole; torch centralizes the others."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    full = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)) + 1
    for cut, launched in ((Shard(0), 1), (Replicate(), 1), (Shard(1), 0)):
        grad = distribute_tensor(full.clone(), mesh, [cut])
        with pytest.MonkeyPatch.context() as patch:
            device = make_device("emulated", patch)
            (result,) = gcx.centralize_many([grad])
            assert device.runs == [("Store", 1)] * launched
            gcx.centralize_many([grad], out=[grad])
            assert device.runs == [("Store", 1)] * 2 * launched
        for found in (result, grad):
            assert found.placements == (cut,)
            torch.testing.assert_close(found.full_tensor(), centralized(full))


def train_parts() -> None:
    """Launch the gradients of a model under FSDP2, which are cut along the output units."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = fully_shard(copy.deepcopy(twin), mesh=mesh)
    pairs = [(net, sgd(net, nesterov=True)) for net in (model, twin)]
    for net, optimizer in pairs:
        gcx.torch.centralize(optimizer, net)
    x = torch.rand(5, 6)
    for net, optimizer in pairs * 3:
        net(x).square().sum().backward()
        with pytest.MonkeyPatch.context() as patch:
            device = make_device("emulated", patch) if net is model else None
            optimizer.step()
        assert device is None or device.runs == [("StoreRate", 2)]
        optimizer.zero_grad()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), expected)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("task", [launch_parts, train_parts])
def test_dtensors(task: Any, world: int) -> None:
    processes.run(world, task)
