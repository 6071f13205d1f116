"""gcx.torch.AdamW and SGD on a GPU: one launch, no waiting, and the step of torch's fused ones."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gcx.torch
from gcx.testing import assert_centralized
from gcx.torch._fused import SGD, AdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BASES: dict[Any, Any] = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {}),
    "adamw-maximize": (AdamW, {"maximize": True, "weight_decay": 0.0}),
    "sgd": (SGD, {"lr": 1e-3}),
    "sgd-decay": (SGD, {"lr": 1e-3, "weight_decay": 0.05, "maximize": True}),
    "momentum": (SGD, {"lr": 1e-3, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.05}),
    "nesterov": (SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
}


class Net(nn.Module):
    """Fan-ins of many lengths, in rows, columns and runs of columns, beside biases and norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 64, 7)  # 147: not a multiple of four
        self.norm = nn.BatchNorm2d(64)
        self.conv = nn.Conv2d(64, 33, 3)
        self.up = nn.ConvTranspose2d(32, 48, 3, groups=2)
        self.columns = nn.ConvTranspose1d(768, 96, 1)
        self.linear = nn.Linear(4096, 24)
        self.long = nn.Linear(14336, 10)
        self.longer = nn.Linear(40000, 3)


def new_model(**options: Any) -> Net:
    return Net().to("cuda", **options)


def give_gradients(step: int, *models: nn.Module) -> None:
    """The same ones to all models, with a mean; in memory as the parameters are."""
    generator = torch.Generator("cuda").manual_seed(step)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        first = parameters[0]
        noise = torch.randn(first.shape, generator=generator, device="cuda") * 0.1 + 0.05
        for p in parameters:
            p.grad = torch.empty_like(p).copy_(noise)


def hooked(model: nn.Module, kind: Any, **options: Any) -> Any:
    optimizer = BASES[kind](model.parameters(), **options)
    gcx.torch.centralize(optimizer, model)
    return optimizer


def distance(found: nn.Module, expected: nn.Module) -> float:
    """How far parameters are apart, in units in the last place of the greatest of each tensor."""
    worst = 0.0
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        top = other.detach().abs().max()
        unit = torch.nextafter(top, 2 * top) - top
        worst = max(worst, float((one.detach() - other.detach()).abs().max() / unit))
    return worst


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_100_steps_are_those_of_torch_fused(case: str, memory_format: Any) -> None:
    kind, options = CASES[case]
    model, twin = (new_model(memory_format=memory_format) for _ in range(2))
    start = copy.deepcopy(model)
    optimizer = kind(model, **options)
    reference = hooked(twin, kind, fused=True, **options)
    for k in range(100):
        give_gradients(k, model, twin)
        optimizer.step()
        reference.step()
    assert optimizer.fallbacks == [""]
    assert distance(model, twin) <= 2
    assert distance(start, twin) > 1000


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(kind: Any, dtype: torch.dtype) -> None:
    """A step from the same weights, with gradients that were rounded before, is a unit away."""
    model = new_model(dtype=dtype)
    twin = copy.deepcopy(model)
    options = {"lr": 2**-6, "weight_decay": 2**-4}
    optimizer, reference = kind(model, **options), hooked(twin, kind, fused=True, **options)
    give_gradients(0, model, twin)
    optimizer.step()
    reference.step()
    assert optimizer.fallbacks == [""]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        top = other.detach().abs().max()
        assert (one - other).abs().max() <= 2 * torch.finfo(dtype).eps * top


def kernels_of(step: Any) -> Counter[str]:
    """Names of what one call starts on the device, and how often."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return Counter({event.key: event.count for event in found.key_averages()})


@pytest.mark.parametrize("kind", BASES)
def test_one_launch_for_what_is_aligned_and_one_for_the_rest(kind: Any) -> None:
    model = new_model()
    optimizer = kind(model)
    give_gradients(0, model)
    on_device = {
        name: count
        for name, count in kernels_of(optimizer.step).items()
        if "emset" in name or "emcpy" in name or "(" in name or "multi_tensor" in name
    }
    assert on_device == {"multi_tensor": 2}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """What waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", BASES)
def test_steps_do_not_wait(kind: Any, request: pytest.FixtureRequest) -> None:
    model = new_model()
    optimizer = kind(model)
    give_gradients(0, model)
    optimizer.step()
    request.getfixturevalue("no_waiting")
    for _ in range(3):
        for p in model.parameters():
            p.grad = p.grad.clone()  # at another address
        optimizer.step()


def test_addresses_that_change() -> None:
    model, twin = new_model(), new_model()
    optimizer, reference = SGD(model, lr=1e-3), hooked(twin, SGD, fused=True, lr=1e-3)
    kept = []
    for k in range(50):
        give_gradients(k, model, twin)
        kept.append(torch.empty(1 + 1000 * (k % 7), device="cuda"))  # so that others are taken
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    assert distance(model, twin) <= 2


def test_captured_step() -> None:
    model, twin = new_model(), new_model()
    optimizer, other = (SGD(m, lr=1e-3, momentum=0.9) for m in (model, twin))
    give_gradients(0, model, twin)
    optimizer.step()
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for k in range(1, 5):
        give_gradients(k, twin)
        for p, other_p in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad.copy_(other_p.grad)
        graph.replay()
        other.step()
    for p, other_p in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, other_p)


def test_other_stream() -> None:
    model, twin = new_model(), new_model()
    optimizer, other = AdamW(model), AdamW(twin)
    stream = torch.cuda.Stream()
    for k in range(5):
        give_gradients(k, model, twin)
        other.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if k % 2 else torch.cuda.current_stream()):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    for p, other_p in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, other_p)


@pytest.mark.parametrize("kind", BASES)
def test_corollary_in_training(kind: Any) -> None:
    """With autocast and a GradScaler; AdamW has no such corollary, and goes down all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).cuda()
    optimizer = kind(model, lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    x, y = torch.rand(32, 3, 8, 8, device="cuda"), torch.randint(10, (32,), device="cuda")
    start = [model[k].weight.detach().clone() for k in (0, 3)]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert optimizer.fallbacks == [""]
    assert losses[-1] < losses[0]
    if kind is SGD:
        for k, weight in zip((0, 3), start, strict=True):
            assert_centralized(model[k].weight, start=weight)


@pytest.mark.parametrize("kind", BASES)
def test_checkpoint_of_the_gpu_goes_on_there_and_on_the_cpu(kind: Any) -> None:
    model = new_model()
    optimizer = kind(model)
    give_gradients(0, model)
    optimizer.step()
    twin = copy.deepcopy(model)
    plain = BASES[kind](twin.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(s["step"].is_cpu for s in plain.state.values() if "step" in s)
    on_cpu = copy.deepcopy(model).cpu()
    other = kind(on_cpu)
    other.load_state_dict(optimizer.state_dict())
    give_gradients(1, model)
    for p, cpu_p in zip(model.parameters(), on_cpu.parameters(), strict=True):
        cpu_p.grad = p.grad.cpu()
    optimizer.step()
    other.step()
    for p, cpu_p in zip(model.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), cpu_p, rtol=1e-5, atol=1e-7)


def test_what_is_left_to_torch() -> None:
    """Weights in float64 and on the CPU, in the same group as those that the kernel takes."""
    layers = [nn.Linear(8, 4, device="cuda"), nn.Linear(8, 4, device="cuda").double()]
    model = nn.ModuleList([*layers, nn.Linear(8, 4)])
    twin = copy.deepcopy(model)
    optimizer, reference = SGD(model, lr=0.1), hooked(twin, SGD, lr=0.1)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        one.grad = torch.rand_like(one)
        other.grad = one.grad.clone()
    (reason,) = optimizer.fallbacks
    assert "float64" in reason
    optimizer.step()
    reference.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_compiled_step() -> None:
    model, twin = new_model(), new_model()
    optimizer, other = AdamW(model), AdamW(twin)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for k in range(3):
        give_gradients(k, model, twin)
        step()
        other.step()
    torch.compiler.reset()
    assert optimizer.fallbacks == [""]
    for p, other_p in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, other_p)
