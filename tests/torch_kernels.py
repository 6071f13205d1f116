"""Three devices for torch's kernels: torch's operations, Triton's interpreter, and a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gcx.backends import _torch_cuda, _torch_triton

Axes = tuple[int, ...]
Roles = Sequence[Sequence[Tensor]]

STAND_IN, INTERPRETER = ON_CPU = ("stand-in", "interpreter")
IS_ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ON_CUDA = [pytest.param("cuda", marks=IS_ON_CUDA)]
on_cpu, interpreted, on_cuda, by_kernel, everywhere = (
    pytest.mark.parametrize("device", names, indirect=True)
    for names in (ON_CPU, [INTERPRETER], ON_CUDA, [INTERPRETER, *ON_CUDA], [*ON_CPU, *ON_CUDA])
)


class Device:
    """One of the three: it keeps count of the kernels, their runs and their launches."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.name = name
        self.type = "cuda" if name == "cuda" else "cpu"
        self.made = 0  # how many `MultiTensor`s
        self.runs: list[tuple[str, int]] = []  # their rule, and their number of tensors
        self.refused: set[torch.dtype] = set()  # as where a CUDA graph is captured too early
        self._recorded: list[Any] | None = None
        patch.setattr(_torch_cuda, "launches", _torch_cuda.Launches())
        if name == INTERPRETER:
            interpret(patch, FakeCuda())
            self._recorded = record(patch)
        elif name == STAND_IN:
            patch.setattr(_torch_cuda, "why_not", lambda _: "")
            patch.setattr(_torch_cuda, "_is_on_cuda", lambda _: True)
        kernel = StandIn if name == STAND_IN else _torch_triton.MultiTensor

        def run(rule: str, roles: Roles, axes: Any, **options: Any) -> Any:
            self.made += 1
            return _Run(self, rule, len(axes), kernel(rule, roles, axes, **options))

        patch.setattr(_torch_cuda, "MultiTensor", run)

    @property
    def launches(self) -> int:
        """The number of launches so far; on a GPU, `on_gpu` counts them."""
        return len(self.runs if self._recorded is None else self._recorded)


class _Run:
    """A `MultiTensor` whose runs are noted."""

    def __init__(self, device: Device, rule: str, count: int, kernel: Any) -> None:
        self._device, self._run, self._kernel = device, (rule, count), kernel

    def __reduce__(self) -> Any:
        pytest.fail("a copy takes kernels with it, and the addresses in them")

    def run(self, roles: Roles, **scalars: Any) -> bool:
        if roles[0][0].dtype in self._device.refused or not self._kernel.run(roles, **scalars):
            return False
        self._device.runs.append(self._run)
        return True


def on_gpu(call: Callable[[], object]) -> Counter[str]:
    """Count the kernels and copies that a call starts on the GPU, by name."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return Counter(event.name for event in found.events() if event.device_type == cuda)


# The interpreter


class FakeCuda:
    """In the place of a CUDA device: its streams, its copies, and their restrictions."""

    def __init__(self) -> None:
        self.stream: int | None = 0  # the current one; None while it is captured for a graph
        self.pinned: list[Any] = []
        self.sent: list[Any] = []  # all tables on the device
        self.shared: list[tuple[Any, int | None]] = []

    def pin(self, table: Any) -> Any:
        assert self.stream is not None, "no memory can be pinned while a graph is captured"
        self.pinned.append(table.clone())
        return self.pinned[-1]

    def send(self, table: Any, device: Any, *, waits: bool = True) -> Any:
        if waits:
            assert self.stream is not None, "nothing can be waited for while a graph is captured"
        else:
            assert any(table is each for each in self.pinned), "copied from memory not pinned"
        self.sent.append(table.clone())
        return self.sent[-1]

    def share(self, table: Any) -> None:
        self.shared.append((table, self.stream))


def interpret(patch: pytest.MonkeyPatch, cuda: FakeCuda) -> Any:
    """Let the host's code take a CPU for a CUDA device; returns the interpreter of Triton.

    It differs from a GPU in bits, and is corrected here: it cuts float32 off to bfloat16, where a
    GPU rounds to nearest, ties to even; it widens subnormal numbers of bfloat16 to something else;
    and it begins a sum with 0.0, so that the sum of negative zeros is positive.
    """
    pytest.importorskip("triton")
    from triton import knobs
    from triton import language as tl
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        pytest.skip("Triton compiles in this process, which TRITON_INTERPRET=1 would change")
    convert = interpreter._convert_float
    with_bfloat16 = {
        (tl.float32, tl.bfloat16): bfloat16_bits,
        (tl.bfloat16, tl.float32): lambda bits: bits.astype(np.uint32) << 16,
    }

    def exact_convert(x: Any, old: Any, new: Any, mode: Any) -> Any:
        exact = with_bfloat16.get((old, new))
        return convert(x, old, new, mode) if exact is None else exact(x)

    def sum_of_zeros_too(self: Any, x: Any) -> Any:
        values = x.handle.data
        total = np.add.reduce(values, axis=self.axis, keepdims=self.keep_dims, initial=-0.0)
        return self.to_tensor(total.astype(values.dtype), x.dtype)

    patch.setattr(interpreter, "_convert_float", exact_convert)
    patch.setattr(interpreter.ReduceOps, "sum", sum_of_zeros_too)
    patch.setattr(_torch_cuda, "_is_on_cuda", lambda _: True)
    patch.setattr(_torch_cuda, "why_not", lambda device=None: "")
    patch.setattr(_torch_cuda, "allow_sync", nullcontext)
    patch.setattr(_torch_triton, "_on", lambda _: nullcontext())
    patch.setattr(_torch_triton, "_stream", lambda: cuda.stream)
    patch.setattr(_torch_triton, "_pin", cuda.pin)
    patch.setattr(_torch_triton, "_send", cuda.send)
    patch.setattr(_torch_triton, "_share", cuda.share)
    patch.setattr(_torch_triton, "_of_graphs", [])
    patch.setattr(_torch_triton, "failures", failures := {})
    patch.setattr(_torch_cuda, "failures", failures)
    return interpreter


def bfloat16_bits(x: Any) -> Any:
    """Round float32 to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16).reshape(np.shape(x))


class _Recorded:
    """In the place of the kernel: launches it, and keeps the arguments."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            named = dict(zip(self._kernel.arg_names, arguments, strict=True))
            self.launches.append({**named, **options})
            self._kernel[grid](*arguments, **options)

        return launch


def record(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """List the arguments of each launch, from now on."""
    from gcx.backends import _triton_kernels

    recorded = _Recorded(_triton_kernels.multi_tensor)
    patch.setattr(_triton_kernels, "multi_tensor", recorded)
    return recorded.launches


# Models and gradients


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


# Kernels made of torch's operations


class StandIn:
    """As `gcx.backends._torch_triton.MultiTensor`, on any device."""

    def __init__(self, rule: str, roles: Roles, axes: Sequence[Axes], *, any_order: bool) -> None:
        assert len({tensor.dtype for tensors in roles for tensor in tensors}) == 1
        self._rule, self._axes = RULES[rule], axes
        self._strides = _strides(roles)

    def run(self, roles: Roles, **scalars: Any) -> bool:
        assert _strides(roles) == self._strides
        for axes, *tensors in zip(self._axes, *roles, strict=True):
            self._rule(SimpleNamespace(**scalars), axes, *tensors)
        return True


def _strides(roles: Roles) -> list[list[tuple[int, ...]]]:
    return [[tensor.stride() for tensor in tensors] for tensors in roles]


def _centralized(x: Tensor, axes: Axes) -> Tensor:
    return x - x.mean(axes, keepdim=True) if axes else x


def _centralize(s: Any, axes: Axes, grad: Tensor, weight: Tensor, out: Tensor) -> None:
    wide, decay = grad.double(), s.rate * weight.double()
    out.copy_(wide - (s.strength * wide + decay).mean(axes, keepdim=True))


def _sgd(s: Any, axes: Axes, grad: Tensor, weight: Tensor, buffer: Tensor | None = None) -> None:
    grad = _centralized((-grad if s.maximize else grad) + s.weight_decay * weight, axes)
    if buffer is not None:
        buffer.copy_(grad if s.first else s.momentum * buffer + (1 - s.dampening) * grad)
        grad = grad + s.momentum * buffer if s.nesterov else buffer
    weight.sub_(s.lr * grad)


def _adamw(s: Any, axes: Axes, grad: Tensor, weight: Tensor, *moments: Tensor) -> None:
    grad = _centralized(-grad if s.maximize else grad, axes)
    weight.sub_(s.decay * weight)
    first, second = moments
    first.lerp_(grad, 1 - s.beta1)
    second.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)
    weight.sub_(s.step_size * first / (second.sqrt() / s.bias2_root + s.eps))


RULES: dict[str, Any] = {"centralize": _centralize, "sgd": _sgd, "adamw": _adamw}
