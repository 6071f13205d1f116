"""Torch's kernels on two devices, a GPU and a CPU that emulates it; steps beside torch's own."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

import gcx.torch
from gcx.backends import _torch_cuda
from gcx.backends._torch import to_numpy  # noqa: F401 - for other files
from gcx.backends.cuda.launcher import Launcher
from gcx.backends.cuda.tables import Launch
from gcx.torch import _fused
from gcx.torch._fused import SGD, AdamW

from emulated_cuda import EmulatedDriver

EMULATED = "emulated"
IS_ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
everywhere = pytest.mark.parametrize(
    "device", [EMULATED, pytest.param("cuda", marks=IS_ON_CUDA)], indirect=True
)
_CACHE = TemporaryDirectory()  # for emulated kernels, which a driver cannot load


class Host(EmulatedDriver):
    """A CPU as the device of kernels; see `gcx.backends.cuda.launcher._Host`."""

    current_stream, captures = 7, False

    def current(self, _: int) -> Any:
        return nullcontext()

    def capability(self, _: int) -> tuple[int, int]:
        return 9, 0

    def stream(self, _: int) -> int:
        return self.current_stream

    def is_capturing(self) -> bool:
        return self.captures

    def allocate(self, _: int, size: int) -> tuple[int, object]:
        memory = torch.empty(size, dtype=torch.uint8)
        return memory.data_ptr(), memory


class Device:
    """One of the two: it keeps a list of the launches."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.name = name
        self.type = "cuda" if name == "cuda" else "cpu"
        self.runs: list[tuple[str, int]] = []  # the rule of a launch, and its number of tensors
        self.due = 0  # tensors of steps that kernels are to make; a test may count them
        self.refused: set[str] = set()  # dtypes; as where a CUDA graph is captured too early
        patch.setattr(_torch_cuda, "_recent", {})
        if name == "cuda":
            found = _torch_cuda.find_launcher()
            assert isinstance(found, Launcher)
            self.launcher = found
        else:
            if which("g++") is None:
                pytest.skip("there is no g++")
            self.driver = Host()
            self.launcher = Launcher(self.driver)
            patch.setenv("XDG_CACHE_HOME", _CACHE.name)
            patch.setattr(_torch_cuda, "find_launcher", lambda: self.launcher)
            patch.setattr(
                _torch_cuda, "why_not", lambda _: "".join(self.launcher.failures.values())
            )
            patch.setattr(_torch_cuda, "_is_on_cuda", lambda _: True)
        launch = self.launcher.launch

        def run(work: Launch, prepared: Any) -> bool:
            if work.dtype in self.refused or not launch(work, prepared):
                return False
            self.runs.append((work.rule, len(work.places)))
            return True

        patch.setattr(self.launcher, "launch", run)

    @property
    def launches(self) -> int:
        """The number of launches so far."""
        return len(self.runs)

    @property
    def total(self) -> int:
        """The number of tensors that have been launched."""
        return sum(self.tensors.values())

    @property
    def tensors(self) -> Counter[str]:
        """The number of tensors that have been launched, by rule."""
        return sum((Counter({rule: count}) for rule, count in self.runs), Counter())


def make_device(name: str, patch: pytest.MonkeyPatch) -> Device:
    """Make a device on which lists and hooks find kernels."""
    if name == EMULATED:
        patch.setattr(Tensor, "is_cuda", True)
        patch.setattr(Tensor, "is_cpu", False)
    return Device(name, patch)


def make_device_for_steps(name: str, patch: pytest.MonkeyPatch) -> Device:
    """Make a device on which the optimizers find kernels; on a CPU, the hooks do not."""
    if name == EMULATED:
        patch.setattr(_fused, "is_for_kernels", lambda _: True)
    return Device(name, patch)


def on_gpu(call: Callable[[], object]) -> Counter[str]:
    """Count the kernels and copies that a call starts on the GPU, by name."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return Counter(event.name for event in found.events() if event.device_type == cuda)


def give_gradients(seed: int, *models: nn.Module) -> None:
    """The same ones to all models, with a mean; new tensors, in memory as the parameters are."""
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        grad = 0.5 + torch.randn(parameters[0].shape, generator=generator)
        for p in parameters:
            p.grad = torch.empty_like(p).copy_(grad)


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    """Compare all parameters, bit for bit."""
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def distance(found: nn.Module, expected: nn.Module) -> float:
    """Find the greatest difference, in last places of the greatest number of each tensor."""
    worst = 0.0
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        top = other.detach().abs().max()
        unit = torch.nextafter(top, 2 * top) - top
        worst = max(worst, float((one.detach() - other.detach()).abs().max() / unit))
    return worst


# Steps of gcx.torch.AdamW and SGD beside those of torch's optimizers

STEPS = 6
BASES: dict[Any, Any] = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}

ADAMW = {"lr": 2**-10, "betas": (1 - 2**-3, 1 - 2**-5), "eps": 2**-27, "weight_decay": 2**-6}
MOMENTUM = {"lr": 2**-10, "momentum": 1 - 2**-3, "weight_decay": 2**-4}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, ADAMW),
    "adamw-maximize": (AdamW, {**ADAMW, "maximize": True, "weight_decay": 0.0}),
    "sgd": (SGD, {"lr": 2**-10}),
    "sgd-decay": (SGD, {"lr": 2**-10, "weight_decay": 2**-4, "maximize": True}),
    "momentum": (SGD, {**MOMENTUM, "dampening": 2**-3}),
    "nesterov": (SGD, {**MOMENTUM, "nesterov": True, "maximize": True}),
}
TYPICAL = ("adamw", "momentum")

Pair = tuple[Any, Any]  # a model and its optimizer


class Net(nn.Module):
    """Fan-ins that are rows and columns, beside biases and norms.

    A fan-in of the transposed convolution `down` is one column, or `runs` of neighbours.
    """

    def __init__(self, head: torch.dtype = torch.float32, *, runs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 1, groups=2)
        self.down = nn.ConvTranspose1d(5, 7, runs)
        self.head = nn.Linear(70, 3, dtype=head)


def new_net(device: Device, **options: Any) -> Any:
    return Net().to(device.type, **options)


def hooked(model: nn.Module, kind: Any, groups: Any = None, **options: Any) -> Optimizer:
    """Make torch's optimizer, with the hooks."""
    optimizer = BASES[kind](groups or model.parameters(), **options)
    gcx.torch.centralize(optimizer, model)
    return optimizer


def both(case: str, model: nn.Module, groups: Any = None, **options: Any) -> tuple[Pair, Pair]:
    """Make ours, and torch's with further options and the hooks."""
    kind, of_case = CASES[case]
    groups = groups or (lambda model: model.parameters())
    twin = copy.deepcopy(model)
    reference = hooked(twin, kind, groups(twin), **of_case, **options)
    return (model, kind(groups(model), model=model, **of_case)), (twin, reference)


def step(k: int, model: nn.Module, optimizer: Optimizer) -> None:
    give_gradients(k, model)
    optimizer.step()


def step_by_closure(k: int, model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.step(lambda: give_gradients(k, model))


def train(
    steps: Iterable[int], *pairs: Pair, training: Callable[[int, Any, Any], None] = step
) -> None:
    for k in steps:
        for pair in pairs:
            training(k, *pair)


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    """Some roundings of float32 apart, and of bfloat16 where that is the dtype."""
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        epsilon = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=32 * epsilon, atol=8 * epsilon)


def assert_close_states(found: Optimizer, expected: Optimizer) -> None:
    one, other = found.state_dict(), expected.state_dict()
    for group in (*one["param_groups"], *other["param_groups"]):
        group["fused"] = group["foreach"] = None  # ours is both in its own way
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=1e-4, atol=1e-6)


def assert_steps_of_torch(
    device: Device, ours: Pair, reference: Pair, steps: int, training: Any = step
) -> None:
    start = copy.deepcopy(ours[0])
    train(range(steps), ours, reference, training=training)
    assert {*ours[1].fallbacks} == {""}
    assert distance(ours[0], reference[0]) <= 2
    assert distance(start, reference[0]) > 1000
    if device.type == "cpu":  # there is no step that is counted on a GPU
        assert_close_states(ours[1], reference[1])
