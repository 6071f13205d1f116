"""The drivers for torch and CuPy as they are, on stand-ins for what they call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import reload
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch

from gcx.backends import _torch_driver

import cupy_stand_in


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Torch on two devices, and a driver that finds it so."""
    found = SimpleNamespace(device=0, captures=False)

    @contextmanager
    def select(device: int) -> Iterator[None]:
        before, found.device = found.device, device
        yield
        found.device = before

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> Any:
        return SimpleNamespace(nbytes=size * dtype.itemsize, data_ptr=lambda: 100 + device.index)

    stand_in = SimpleNamespace(
        current_device=lambda: found.device,
        device=select,
        current_stream=lambda device: SimpleNamespace(cuda_stream=7 + device),
        is_current_stream_capturing=lambda: found.captures,
        get_device_capability=lambda device: (8, device),
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(_torch_driver, "Driver", None)  # the old one comes back afterwards
    found.driver = reload(_torch_driver).Driver()
    return found


@pytest.mark.parametrize(("before", "device"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_torch_is_asked_for_the_device(cuda: Any, before: int, device: int) -> None:
    cuda.device, driver = before, cuda.driver
    with driver.current(device):
        assert cuda.device == device
    assert cuda.device == before
    assert driver.stream(device) == 7 + device
    assert driver.capability(device) == (8, device)
    address, owner = driver.allocate(device, 48)
    assert (address, owner.nbytes) == (100 + device, 48)


@pytest.mark.parametrize("captures", [False, True])
def test_captures(cuda: Any, captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's memory for a graph outlives its owner; other memory does not."""
    cupy = cupy_stand_in.StandIn()
    host = SimpleNamespace(driver=None, nvrtc=None, runtime=None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", host)
    driver = cupy_stand_in.install(monkeypatch, cupy).Driver()
    cuda.captures = cupy.is_capturing = captures
    assert cuda.driver.is_capturing() == driver.is_capturing() == captures
    _, memory = driver.allocate(0, 48)
    array = ref(memory.owner)
    del memory
    assert (array() is not None) == captures
