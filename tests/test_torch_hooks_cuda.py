"""The hooks of gcx.torch on a GPU: one launch, no waiting, in CUDA graphs and beside a scaler."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

import gcx.torch
from gcx.testing import assert_centralized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Net(nn.Module):
    """Rows and columns in whole pieces of 16 bytes; with `odd` others too, for a second launch."""

    def __init__(self, *, odd: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(64, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(768, 96, 1)
        self.linear = nn.Linear(4096, 24)
        if odd:
            self.first = nn.Conv2d(3, 64, 7)
            self.groups = nn.ConvTranspose2d(32, 48, 3, groups=2)


def new_net(*, odd: bool = False, **options: Any) -> Net:
    return Net(odd=odd).to("cuda", **options)


def give_gradients(seed: int, *models: nn.Module) -> None:
    """The same ones to all models, with a mean; new tensors, in memory as the parameters are."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        grad = 0.5 + torch.randn(parameters[0].shape, generator=generator, device="cuda")
        for p in parameters:
            p.grad = torch.empty_like(p).copy_(grad)


def sgd(model: nn.Module, **options: Any) -> SGD:
    return SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1, **options)


# One launch, no waiting


def on_device(call: Callable[[], object]) -> Counter[str]:
    """What a call starts on the device, and how often."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type.name == "CUDA"]
    return Counter(event.name for event in events)


def added_by_hooks(model: nn.Module, optimizer: Optimizer, **options: Any) -> Counter[str]:
    give_gradients(0, model)
    plain = on_device(optimizer.step)
    with pytest.warns(UserWarning, match="momentum"):  # of the steps before
        gcx.torch.centralize(optimizer, model, **options)
    return on_device(optimizer.step) - plain


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize(("odd", "launches"), [(False, 1), (True, 2)])
def test_launches_of_a_step(odd: bool, launches: int, reproducible: bool) -> None:
    """Nothing else than the kernel: addresses have been sent in the step before."""
    model = new_net(odd=odd)
    added = added_by_hooks(model, sgd(model), reproducible=reproducible)
    assert added == {"multi_tensor": launches}


def test_launches_of_two_dtypes_and_two_rates() -> None:
    model = nn.ModuleList([new_net(), new_net(dtype=torch.bfloat16), new_net()])
    groups = [{"params": part.parameters()} for part in model]
    groups[2]["weight_decay"] = 0.2
    optimizer = SGD(groups, lr=1e-3, momentum=0.9, weight_decay=0.1)
    assert added_by_hooks(model, optimizer) == {"multi_tensor": 3}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Let every call that waits for the device raise an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_does_not_wait(fused: bool) -> None:
    """Neither with the addresses of the step before nor with others."""
    model = new_net(odd=True)
    optimizer = sgd(model, fused=fused)
    gcx.torch.centralize(optimizer, model)
    x = torch.rand(8, 4096, device="cuda")
    kept = []
    for k in range(6):
        optimizer.zero_grad()
        give_gradients(k, model)
        model.linear(x).square().mean().backward()
        if k == 2:
            torch.cuda.set_sync_debug_mode("error")
        if k > 3:  # so that the next ones are elsewhere
            kept += [parameter.grad for parameter in model.parameters()]
        optimizer.step()


# What comes out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reproducible_gradients_are_those_of_a_cpu(dtype: torch.dtype, memory_format: Any) -> None:
    model = new_net(odd=True, dtype=dtype, memory_format=memory_format)
    give_gradients(0, model)
    on_cpu = Net(odd=True).to(dtype)
    for found, expected in zip(model.parameters(), on_cpu.parameters(), strict=True):
        expected.grad = found.grad.cpu().contiguous()
    for one in (model, on_cpu):
        optimizer = SGD(one.parameters(), lr=0.0, weight_decay=0.1)
        gcx.torch.centralize(optimizer, one, reproducible=True)
        optimizer.step()
    for found, expected in zip(model.parameters(), on_cpu.parameters(), strict=True):
        assert torch.equal(found.grad.cpu(), expected.grad)


def test_corollary_4_1() -> None:
    """SGD with momentum and decay keeps the mean of each fan-in, on gradients of a loss."""
    model = new_net()
    start = copy.deepcopy(model)
    optimizer = sgd(model, nesterov=True)
    gcx.torch.centralize(optimizer, model)
    image = torch.rand(8, 64, 8, 8, device="cuda")
    deep, flat = torch.rand(8, 768, 4, 4, device="cuda"), torch.rand(8, 4096, device="cuda")
    for _ in range(20):
        optimizer.zero_grad()
        outputs = model.norm(model.conv(image)), model.up(deep), model.linear(flat)
        sum((output - 1).square().mean() for output in outputs).backward()
        optimizer.step()
    for name, layout in {"conv": "o...", "up": "io...", "linear": "oi"}.items():
        weight, before = (net.get_submodule(name).weight.detach() for net in (model, start))
        assert_centralized(weight, start=before, layout=layout)


def test_closure() -> None:
    model, twin = new_net(odd=True), new_net(odd=True)
    optimizer, reference = sgd(model), sgd(twin)
    for one, net in ((optimizer, model), (reference, twin)):
        gcx.torch.centralize(one, net)
    for k in range(3):
        optimizer.step(lambda k=k: give_gradients(k, model))
        give_gradients(k, twin)
        reference.step()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


# CUDA graphs


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_graph_of_a_step(kind: Any) -> None:
    """Replayed with other gradients in the same places, after the handle took other steps too."""
    options = {"momentum": 0.9} if kind is SGD else {"capturable": True}
    nets = model, twin = new_net(odd=True), new_net(odd=True)
    optimizer, reference = (kind(net.parameters(), lr=1e-3, **options) for net in nets)
    for one, net in ((optimizer, model), (reference, twin)):
        gcx.torch.centralize(one, net)
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
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


# GradScaler


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients(fused: bool) -> None:
    """Steps as without a scaler, whose factors are powers of two; that with infinity is skipped."""
    model, twin = new_net(), new_net()
    optimizer, reference = sgd(model, fused=fused), sgd(twin, fused=fused)
    for one, net in ((optimizer, model), (reference, twin)):
        gcx.torch.centralize(one, net)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    x = torch.rand(8, 4096, device="cuda")

    def loss_of(net: Net) -> torch.Tensor:
        return (net.linear(x) - 1).square().mean()

    start = twin.linear.weight.detach().clone()
    for k in range(6):
        is_finite = k != 2
        optimizer.zero_grad()
        scaler.scale(loss_of(model) if is_finite else torch.inf * loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        if is_finite:
            reference.zero_grad()
            loss_of(twin).backward()
            reference.step()
    torch.testing.assert_close(model.linear.weight, twin.linear.weight, rtol=1e-5, atol=1e-7)
    assert (start - twin.linear.weight).abs().max() > 1e-4
