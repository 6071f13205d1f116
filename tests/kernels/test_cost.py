"""Few Python frames come before a launch, and none for each tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import gcx
from gcx.backends import _torch, _torch_cuda
from gcx.backends.cuda.launcher import Schedule
from gcx.torch import SGD

from torch_kernels import Device, make_device  # noqa: F401 - for the fixture `device`

HOUSE = str(Path(gcx.__file__).parent)


def count_frames(device: Device, call: Callable[[], object]) -> tuple[int, int]:
    """Count the frames of gcx that a call starts before its launch, and those around it.

    From Python 3.12 on, a comprehension has no frame of its own, so none counts.
    """
    call()
    call()
    started = around = 0
    launch = device.driver.launch.__func__.__code__  # type: ignore[attr-defined]

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal started, around
        if event != "call" or around:
            return
        code = frame.f_code
        started += code.co_filename.startswith(HOUSE) and code.co_name != "<listcomp>"
        if code is launch:
            while frame := frame.f_back:  # type: ignore[assignment]
                around += frame.f_code.co_filename.startswith(HOUSE)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert around
    return started, around


def call_backend(grads: list[Tensor], out: Any) -> None:
    _torch.centralize_many(grads, [(1,)] * len(grads), 1.0, out or [None] * len(grads), False)


# The public function checks strength and finds the form of the list before it calls the backend.
@pytest.mark.parametrize(("call", "most"), [(call_backend, 12), (gcx.centralize_many, 16)])
@pytest.mark.parametrize("in_place", [False, True])
def test_frames(call: Callable[..., None], most: int, in_place: bool, device: Device) -> None:
    found = set()
    for count in (2, 54):
        grads = [torch.ones(4, 8 * k) for k in range(1, count + 1)]
        found.add(count_frames(device, partial(call, grads, out=grads if in_place else None)))
    ((started, around),) = found
    assert started <= most
    assert around <= 12


def test_lists_are_prepared_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock(wraps=Schedule)
    monkeypatch.setattr(_torch_cuda, "Schedule", made)
    layers = nn.ModuleList([nn.Linear(2, 3 + k // 2) for k in range(20)])  # two of each
    optimizer = SGD(layers)
    for layer in (*layers, *layers):
        optimizer.zero_grad()
        layer(torch.ones(2)).sum().backward()
        optimizer.step()
    assert made.call_count == 10
    assert device.tensors == {"Sgd": 80}
