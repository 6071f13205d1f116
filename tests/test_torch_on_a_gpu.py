"""Torch on a GPU: steps with the hooks and of gcx.torch.AdamW and SGD; graphs, streams, threads.

``python -m benchmarks gpu --check`` holds more: bits of lists of all kinds 50 times over, addresses
that change, steps in float32, launches and waits, and a GPU that is busy.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn

import gcx
import gcx.torch
from gcx.testing import assert_centralized
from gcx.torch import SGD, AdamW

from torch_kernels import (
    BASES,
    IS_ON_CUDA,
    MOMENTUM,
    Device,
    Net,
    Pair,
    assert_equal,
    both,
    give_gradients,
    hooked,
    new_net,
    on_gpu,
    step,
    train,
)

pytestmark = IS_ON_CUDA

_FOLDER = Path(__file__).parent

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd with hooks": partial(hooked, kind=SGD, **MOMENTUM),
    "fused sgd with hooks": partial(hooked, kind=SGD, fused=True, **MOMENTUM),
    "adamw with hooks": partial(hooked, kind=AdamW, capturable=True),
    "sgd": partial(SGD, **MOMENTUM),
    "adamw": AdamW,
}


class LongNet(Net):
    """Rows and columns that take several blocks each, beside short ones."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ConvTranspose1d(768, 96, 1)
        self.long = nn.Linear(40000, 3)


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Callable[[nn.Module], Any]:
    return OPTIMIZERS[request.param]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device("cuda", monkeypatch)


def two_of(make: Callable[[nn.Module], Any], device: Device) -> tuple[Pair, Pair]:
    """Two alike, of which the second takes its steps as usual."""
    one, other = ((net, make(net)) for net in (new_net(device), new_net(device)))
    return one, other


def test_a_step_does_not_wait(make: Any, device: Device) -> None:
    """Neither with the addresses of the step before nor with others."""
    model = new_net(device)
    optimizer = make(model)
    train(range(2), (model, optimizer))
    kept = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            kept += [p.grad for p in model.parameters()]  # so that the next ones are elsewhere
            for p in model.parameters():
                p.grad = p.grad.clone()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", BASES)
def test_one_launch_for_each_kind_of_kernel(kind: Any) -> None:
    """For rows, long rows, columns, tensors without a fan-in, and two for split columns."""
    model = LongNet().cuda()
    step(0, model, optimizer := kind(model))
    assert on_gpu(optimizer.step) == {"gcx_kernel": 6}


@pytest.mark.parametrize("name", ["sgd with hooks", "adamw with hooks", "sgd"])
def test_graph_of_a_step(name: str, device: Device) -> None:
    """Replayed with other gradients in the same places, between other steps."""
    (model, optimizer), (twin, reference) = two_of(OPTIMIZERS[name], device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(range(3), (model, optimizer), (twin, reference))
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


def test_other_stream(make: Any, device: Device) -> None:
    (model, optimizer), usual = two_of(make, device)
    stream = torch.cuda.Stream()
    for k in range(5):
        give_gradients(k, model, usual[0])
        usual[1].step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if k % 2 else torch.cuda.current_stream()):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert_equal(model, usual[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_compiled_step(device: Device) -> None:
    (model, optimizer), usual = two_of(AdamW, device)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for k in range(3):
        give_gradients(k, model, usual[0])
        compiled()
        usual[1].step()
    assert optimizer.fallbacks == [""]
    assert_equal(model, usual[0])


def test_scaled_gradients(make: Any, device: Device) -> None:
    """Steps as without a scaler, whose factors are powers of two; an infinite one is skipped."""
    (model, optimizer), (twin, reference) = two_of(make, device)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    x, start = torch.rand(8, 70, device="cuda"), twin.head.weight.detach().clone()
    for factor in (1, 1, torch.inf, 1, 1, 1):
        optimizer.zero_grad()
        scaler.scale(factor * (model.head(x) - 1).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            reference.zero_grad()
            (twin.head(x) - 1).square().mean().backward()
            reference.step()
    torch.testing.assert_close(model.head.weight, twin.head.weight, rtol=1e-5, atol=1e-7)
    assert (start - twin.head.weight).abs().max() > 1e-4


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(kind: Any, dtype: torch.dtype, device: Device) -> None:
    """Rounded once: a step from the same numbers in float32 is at most a unit away."""
    model = LongNet().to("cuda", dtype)
    twin = copy.deepcopy(model).float()
    options = {"lr": 2**-6, "weight_decay": 2**-4}
    optimizer, reference = kind(model, **options), hooked(twin, kind, **options)
    give_gradients(0, model)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = one.grad.float()
    optimizer.step()
    reference.step()
    assert optimizer.fallbacks == [""]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.float() - other).abs().max() <= torch.finfo(dtype).eps * other.abs().max()


@pytest.mark.parametrize("kind", BASES)
def test_checkpoint_of_the_gpu_goes_on_there_and_on_the_cpu(kind: Any, device: Device) -> None:
    """With torch's own optimizer too, whose steps are still counted on the CPU."""
    model = new_net(device)
    step(0, model, optimizer := kind(model))
    plain = BASES[kind](copy.deepcopy(model).parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(s["step"].is_cpu for s in plain.state.values() if "step" in s)
    on_cpu = copy.deepcopy(model).cpu()
    other = kind(on_cpu)
    other.load_state_dict(optimizer.state_dict())
    train([1], (model, optimizer), (on_cpu, other))
    for p, cpu_p in zip(model.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), cpu_p, rtol=1e-5, atol=1e-7)


def test_corollary_4_1_on_gradients_of_a_loss(make: Any) -> None:
    """With autocast and a GradScaler; AdamW has no such corollary, and goes down all the same."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(288, 10)).cuda()
    start, optimizer = copy.deepcopy(model), make(model)
    scaler = torch.amp.GradScaler("cuda")
    x, y = torch.rand(32, 3, 8, 8, device="cuda"), torch.randint(10, (32,), device="cuda")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert getattr(optimizer, "fallbacks", [""]) == [""]
    assert losses[-1] < losses[0]
    for row in gcx.torch.plan(model):
        if row.layout is not None and isinstance(optimizer, torch.optim.SGD):
            weight, before = (net.get_parameter(row.name).detach() for net in (model, start))
            assert_centralized(weight, start=before, layout=row.layout)


def test_what_is_left_to_torch() -> None:
    """Weights on the CPU, in the same group as those that the kernel takes."""
    layers = [nn.Linear(8, 4, device="cuda"), nn.Linear(8, 4)]
    ours, reference = both("sgd", nn.ModuleList(layers))
    give_gradients(0, ours[0], reference[0])
    (reason,) = ours[1].fallbacks
    assert "on cpu" in reason
    ours[1].step()
    reference[1].step()
    for one, other in zip(ours[0].parameters(), reference[0].parameters(), strict=True):
        torch.testing.assert_close(one, other)


# Lists of gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_rows_with_weight_decay(dtype: torch.dtype) -> None:
    """Bits of the gradients that the hooks leave, as on the CPU; one NaN spoils one unit."""
    model = LongNet().to("cuda", dtype)
    on_cpu = copy.deepcopy(model).cpu()
    give_gradients(0, model, on_cpu)
    for net in (model, on_cpu):
        net.long.weight.grad[1, 5] = torch.nan
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, weight_decay=0.1)
        gcx.torch.centralize(optimizer, net, reproducible=True)
        optimizer.step()
    for one, other in zip(model.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=0, atol=0, equal_nan=True)
    assert model.long.weight.grad.isnan().sum() == 40000


def test_graph_captured_without_a_first_launch() -> None:
    run_beside("""
        import pytest, torch, gcx
        grad = torch.randn(64, 100, device="cuda")
        kept = grad.clone()
        graph = torch.cuda.CUDAGraph()
        with pytest.warns(RuntimeWarning, match="before the capture"), torch.cuda.graph(graph):
            out = gcx.centralize(grad)
        graph.replay()
        torch.testing.assert_close(out, kept - kept.mean(1, keepdim=True))
    """)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_compiled_as_it_was() -> None:
    grad = torch.randn(64, 300, device="cuda")
    compiled: Callable[..., Any] = torch.compile(gcx.centralize, fullgraph=True)
    torch.testing.assert_close(compiled(grad), grad - grad.mean(1, keepdim=True))


def test_streams_at_the_same_time() -> None:
    """The sums of columns are left in memory, which streams do not share."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    lists = [[torch.randn(3000, 520 + 32 * k, device="cuda") for k in range(8)] for _ in streams]
    torch.cuda.synchronize()
    wanted = [gcx.centralize_many(grads, layouts="io") for grads in lists]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream, grads in zip(streams, lists, strict=True):
            with torch.cuda.stream(stream):
                copies = [grad.clone() for grad in grads]
                found.append(gcx.centralize_many(copies, layouts="io", out=copies))
    torch.cuda.synchronize()
    for k, copies in enumerate(found):
        assert all(map(torch.equal, copies, wanted[k % 2]))


def test_thread_that_has_not_used_cuda() -> None:
    run_beside("""
        import threading, torch, gcx
        grads = [torch.randn(64, 100, device="cuda"), torch.randn(3000, 40, device="cuda")]
        found = []
        call = lambda: found.extend(gcx.centralize_many(grads, layouts=["oi", "io"]))
        for _ in range(2):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        for k, result in enumerate(found):
            grad = grads[k % 2]
            wanted = grad - grad.mean(1 - k % 2, keepdim=True)
            torch.testing.assert_close(result, wanted)
        assert len(found) == 4
    """)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_devices() -> None:
    grads = [torch.randn(500, 64, device=f"cuda:{k % 2}") for k in range(6)]
    wanted = [grad - grad.mean(0, keepdim=True) for grad in grads]
    gcx.centralize_many(grads, layouts="io", out=grads)
    torch.testing.assert_close(grads, wanted)
    assert torch.cuda.current_device() == 0


def run_beside(program: str) -> None:
    """Run a program in a process of its own, and end it if it hangs."""
    command = [sys.executable, "-c", dedent(program)]
    done = subprocess.run(
        command, cwd=_FOLDER, stderr=subprocess.PIPE, text=True, timeout=120.0, check=False
    )
    assert done.returncode == 0, done.stderr
