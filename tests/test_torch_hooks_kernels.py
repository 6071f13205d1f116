"""The hooks of gcx.torch with kernels: few launches, no waiting, and right results."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from gcx.testing import assert_centralized

import processes
from torch_kernels import (
    Device,
    assert_equal,
    emulated,
    everywhere,
    give_gradients,
    no_waiting,
    on_cuda,
    on_gpu,
)

# Launches of a step of `Net`, of rows and of columns; on a GPU, some columns take two kernels.
LAUNCHES, KERNELS = 2, 4


def make_device(name: str, patch: pytest.MonkeyPatch) -> Device:
    """Make a device on which the hooks find kernels."""
    if name == "emulated":
        patch.setattr(Tensor, "is_cuda", True)
    return Device(name, patch)


class Net(nn.Module):
    """Fan-ins in rows and columns, in groups and of odd length, beside biases and a norm."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv, up, linear, odd, groups = ((8, 8, 2), (8, 16), (64, 8), (7, 3, 1), (8, 16))
        if device.type == "cuda":
            conv, up, linear = ((64, 32, 3), (768, 96), (4096, 24))
            odd, groups = ((3, 64, 7), (32, 48))
        self.conv = nn.Conv2d(*conv)
        self.norm = nn.BatchNorm2d(conv[1])
        self.up = nn.ConvTranspose2d(*up, 1)
        self.linear = nn.Linear(*linear)
        self.odd = nn.Conv2d(*odd)
        self.groups = nn.ConvTranspose2d(*groups, 1, groups=2)
        self.to(device.type)


def sgd(model: nn.Module, **options: Any) -> SGD:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options}
    return SGD(model.parameters(), **options)


def centralized(weight: Tensor) -> Tensor:
    return weight - weight.mean(1, keepdim=True)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3, **options: Any) -> None:
    handle = gcx.torch.centralize(optimizer, model, **options)
    for seed in range(steps):
        give_gradients(seed, model)
        optimizer.step()
    handle.remove()


def ordinarily(monkeypatch: pytest.MonkeyPatch, call: Callable[..., None], *args: Any) -> None:
    """Call without kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", False)
        call(*args)


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    """Compare up to rounding. Momentum adds up the rounding of several steps."""
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        tolerance = 4 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=name)


def launches_on(device: Device) -> int:
    return KERNELS if device.type == "cuda" else LAUNCHES


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
    model = Net(device)
    found = added_by_hooks(device, model, sgd(model), reproducible=reproducible)
    assert found == launches_on(device)


@everywhere
def test_launches_for_each_dtype_and_rate_of_decay(device: Device) -> None:
    model = nn.ModuleList([Net(device), Net(device).bfloat16(), Net(device)])
    groups = [{"params": part.parameters()} for part in model]
    groups[2]["weight_decay"] = 0.2
    optimizer = SGD(groups, lr=1e-3, momentum=0.9, weight_decay=0.1)
    assert added_by_hooks(device, model, optimizer) == 3 * launches_on(device)


@emulated
def test_groups_of_one_rate_are_launched_together(device: Device) -> None:
    model = Net(device)
    groups = [{"params": [p], "lr": 0.01 * k} for k, p in enumerate(model.parameters())]
    train(model, SGD(groups, lr=0.1, weight_decay=0.1))
    assert device.launches == 3 * LAUNCHES


@emulated
def test_rate_in_a_tensor_is_not_waited_for(device: Device) -> None:
    """As a GradScaler sets it, while the gradients are still scaled."""
    model = Net(device)
    still = type("Still", (Optimizer,), {"step": lambda self: None})
    optimizer = still(model.parameters(), {"weight_decay": 0.5})
    gcx.torch.centralize(optimizer, model, decay="inside")
    give_gradients(0, model)
    grad, weight = model.linear.weight.grad.clone(), model.linear.weight.detach()
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    assert device.launches == 0
    expected = grad - (grad + 4 * weight).mean(1, keepdim=True)
    torch.testing.assert_close(model.linear.weight.grad, expected)


@emulated
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


@emulated
def test_gradients_now(where: Any, device: Device) -> None:
    model = Net(device)
    handle = gcx.torch.centralize(AdamW(model.parameters()), model, where=where)
    for centralize in (handle.centralize_grads_, partial(gcx.torch.centralize_grads_, model)):
        before = device.launches
        give_gradients(0, model)
        expected = centralized(model.linear.weight.grad)
        centralize()
        assert device.launches == before + LAUNCHES
        torch.testing.assert_close(model.linear.weight.grad, expected)


@emulated
@pytest.mark.parametrize(("name", "error"), [("grad", TypeError), ("data", RuntimeError)])
def test_errors_come_before_the_launch(name: str, error: type[Exception], device: Device) -> None:
    model = Net(device)
    gcx.torch.centralize(optimizer := sgd(model), model)
    for is_spoiled in (False, True):  # in the first step, and in one like the last
        give_gradients(0, model)
        before = model.conv.weight.grad.clone()
        if is_spoiled and name == "grad":
            model.linear.weight.grad = model.linear.weight.grad.to_sparse()
        elif is_spoiled:
            model.linear.weight = nn.Parameter(model.linear.weight.detach().clone())
        with pytest.raises(error, match=r"linear\.weight") if is_spoiled else nullcontext():
            optimizer.step()
    assert torch.equal(model.conv.weight.grad, before)
    assert device.launches == LAUNCHES


@emulated
def test_copies_launch_for_themselves(device: Device) -> None:
    model = Net(device)
    model.optimizer = sgd(model)
    model.handle = gcx.torch.centralize(model.optimizer, model)
    give_gradients(0, model)
    model.optimizer.step()
    with pytest.warns(UserWarning, match="does not centralize"):
        twin = copy.deepcopy(model)
    give_gradients(1, twin)
    grad, expected = model.linear.weight.grad.clone(), centralized(twin.linear.weight.grad)
    twin.handle.centralize_grads_()
    assert device.launches == 2 * LAUNCHES
    torch.testing.assert_close(twin.linear.weight.grad, expected)
    assert torch.equal(model.linear.weight.grad, grad)


@emulated
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"maximize": True}])
def test_training_is_that_of_the_ordinary_way(
    options: Any,
    dtype: torch.dtype,
    memory_format: Any,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, model, twin = (Net(device).to(dtype, memory_format=memory_format) for _ in range(3))
    ordinarily(monkeypatch, train, twin, sgd(twin, **options))
    assert device.launches == 0
    train(model, sgd(model, **options))
    assert device.launches == 3 * LAUNCHES
    assert_close(model, twin)
    with pytest.raises(AssertionError):
        assert_close(start, twin)


@emulated
def test_not_all_gradients_are_there_in_each_step(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(model: nn.Module) -> None:
        gcx.torch.centralize(optimizer := sgd(model), model)
        for seed in range(6):
            give_gradients(seed, model)
            if seed % 2:
                model.conv.weight.grad = None
            if seed == 4:
                model.zero_grad()
            optimizer.step()

    model, twin = Net(device), Net(device)
    some(model)
    assert device.launches == 5 * LAUNCHES
    ordinarily(monkeypatch, some, twin)
    assert_close(model, twin)


@everywhere
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_reproducible_gradients(
    dtype: torch.dtype, memory_format: Any, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the bits of torch's own operations on a CPU in all strides."""
    model = Net(device).to(dtype, memory_format=memory_format)
    on_cpu = Net(device).to("cpu", dtype)
    give_gradients(0, model, on_cpu)

    def step(model: nn.Module) -> None:
        optimizer = SGD(model.parameters(), lr=0.0, weight_decay=0.1)
        gcx.torch.centralize(optimizer, model, reproducible=True)
        optimizer.step()

    step(model)
    ordinarily(monkeypatch, step, on_cpu)
    for found, expected in zip(model.parameters(), on_cpu.parameters(), strict=True):
        assert torch.equal(found.grad.cpu(), expected.grad)
    assert device.launches == LAUNCHES


@on_cuda
def test_corollary_4_1_on_gradients_of_a_loss(device: Device) -> None:
    model = Net(device)
    start = copy.deepcopy(model)
    gcx.torch.centralize(optimizer := slow_sgd(model, nesterov=True), model)
    image = torch.rand(8, 64, 8, 8, device="cuda")
    deep, flat = torch.rand(8, 768, 4, 4, device="cuda"), torch.rand(8, 4096, device="cuda")
    for _ in range(20):
        optimizer.zero_grad()
        outputs = model.norm(model.conv(image)), model.up(deep), model.linear(flat)
        sum((output - 1).square().mean() for output in outputs).backward()
        optimizer.step()
    for row in gcx.torch.plan(model):
        if row.layout is not None:
            weight, before = (net.get_parameter(row.name).detach() for net in (model, start))
            assert_centralized(weight, start=before, layout=row.layout)


@everywhere
def test_closure(device: Device) -> None:
    (model, optimizer), (twin, reference) = two_hooked(device, sgd)
    for k in range(3):
        optimizer.step(lambda k=k: give_gradients(k, model))
        give_gradients(k, twin)
        reference.step()
    assert_equal(model, twin)


# A GPU alone


slow_sgd = partial(sgd, lr=1e-3)


def two_hooked(device: Device, kind: Any, **options: Any) -> list[Any]:
    """Two alike, each with its optimizer."""
    pairs = [(model, kind(model, **options)) for model in (Net(device), Net(device))]
    for model, optimizer in pairs:
        gcx.torch.centralize(optimizer, model)
    return pairs


@on_cuda
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_does_not_wait(fused: bool, device: Device) -> None:
    """Neither with the addresses of the step before nor with others."""
    model = Net(device)
    gcx.torch.centralize(optimizer := slow_sgd(model, fused=fused), model)
    x = torch.rand(8, 4096, device="cuda")
    grads = []
    for k in range(6):
        give_gradients(k, model)
        grads.append([parameter.grad for parameter in model.parameters()])
    kept = []
    for k, of_step in enumerate(grads):
        with no_waiting() if k >= 2 else nullcontext():
            optimizer.zero_grad()
            for parameter, grad in zip(model.parameters(), of_step, strict=True):
                parameter.grad = grad.clone()
            model.linear(x).square().mean().backward()
            if k > 3:  # so that the next ones are elsewhere
                kept += [parameter.grad for parameter in model.parameters()]
            optimizer.step()


@on_cuda
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_graph_of_a_step(kind: Any, device: Device) -> None:
    """Replayed with other gradients in the same places, after the handle took other steps too."""
    options = {"momentum": 0.9} if kind is SGD else {"capturable": True}
    (model, optimizer), (twin, reference) = two_hooked(
        device, lambda net: kind(net.parameters(), lr=1e-3, **options)
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for k in range(3):
            give_gradients(k, model, twin)
            optimizer.step()
            reference.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    places = [parameter.grad for parameter in model.parameters()]
    with torch.cuda.graph(graph):
        optimizer.step()
    for k in range(3, 9):
        give_gradients(k, model, twin)
        if k % 2:
            for place, parameter in zip(places, model.parameters(), strict=True):
                place.copy_(parameter.grad)
            graph.replay()
        else:
            optimizer.step()
        reference.step()
    assert_equal(model, twin)


@on_cuda
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients(fused: bool, device: Device) -> None:
    """Steps as without a scaler, whose factors are powers of two; that with infinity is skipped."""
    (model, optimizer), (twin, reference) = two_hooked(device, slow_sgd, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    x = torch.rand(8, 4096, device="cuda")
    start = twin.linear.weight.detach().clone()
    for factor in (1, 1, torch.inf, 1, 1, 1):
        optimizer.zero_grad()
        scaler.scale(factor * (model.linear(x) - 1).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            reference.zero_grad()
            (twin.linear(x) - 1).square().mean().backward()
            reference.step()
    torch.testing.assert_close(model.linear.weight, twin.linear.weight, rtol=1e-5, atol=1e-7)
    assert (start - twin.linear.weight).abs().max() > 1e-4


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
