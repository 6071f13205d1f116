"""The Triton kernels on a CPU: Triton interprets them, one tile after the other.

Triton must be told before it is imported, and then interprets everything. So where there is a GPU,
whose tests need it to compile, the interpreted tests run in a process of their own, started with
TRITON_INTERPRET=1.

The interpreter of Triton differs from a GPU in bits, and is corrected here: it cuts float32 off to
bfloat16, where a GPU rounds to nearest, ties to even; it widens subnormal numbers of bfloat16 to
something else; and it begins a sum with 0.0, so that the sum of negative zeros is positive.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


INSTALLED = all(map(find_spec, ("torch", "triton")))
if INSTALLED and "triton" not in sys.modules and not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def interpreter() -> Any:
    """The interpreter of Triton, with the arithmetic of a GPU."""
    pytest.importorskip("triton")
    from triton import knobs
    from triton import language as tl
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        pytest.skip("Triton compiles in this process: run pytest tests/kernels by itself")
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", exact_convert)
        patch.setattr(interpreter.ReduceOps, "sum", sum_of_zeros_too)
        yield interpreter


def bfloat16_bits(x: Any) -> Any:
    """Round float32 to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16).reshape(np.shape(x))


class Device:
    """In the place of a CUDA device: its streams, its copies, and what these may not do."""

    def __init__(self) -> None:
        self.stream: int | None = 0  # the current one; None while it is captured for a graph
        self.pinned: list[Any] = []
        self.sent: list[Any] = []  # what is on the device
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


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def on_cpu(interpreter: Any, device: Device, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the host's code take a CPU for a CUDA device, which is `device`."""
    from gcx.backends import _torch_cuda, _torch_triton

    monkeypatch.setattr(_torch_cuda, "_is_on_cuda", lambda tensor: True)
    monkeypatch.setattr(_torch_cuda, "why_not", lambda device=None: "")
    monkeypatch.setattr(_torch_triton, "_on", lambda device: nullcontext())
    monkeypatch.setattr(_torch_cuda, "allow_sync", nullcontext)
    monkeypatch.setattr(_torch_triton, "_stream", lambda: device.stream)
    monkeypatch.setattr(_torch_triton, "_pin", device.pin)
    monkeypatch.setattr(_torch_triton, "_send", device.send)
    monkeypatch.setattr(_torch_triton, "_share", device.share)
    monkeypatch.setattr(_torch_triton, "_of_graphs", [])
    monkeypatch.setattr(_torch_triton, "failures", {})
    monkeypatch.setattr(_torch_cuda, "failures", _torch_triton.failures)
    return monkeypatch
