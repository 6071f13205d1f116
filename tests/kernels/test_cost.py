"""Few Python frames come before a launch, and none for each tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import gcx
from gcx.backends import _torch

from torch_kernels import EMULATED, Device

HOUSE = str(Path(gcx.__file__).parent)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    return Device(EMULATED, monkeypatch)


def count_frames(device: Device, call: Callable[[], object]) -> tuple[int, int]:
    """Count the frames of gcx that a call starts before its launch, and those around it."""
    call()
    call()
    started = around = 0
    launch = device.driver.launch.__func__.__code__  # type: ignore[attr-defined]

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal started, around
        if event != "call" or around:
            return
        started += frame.f_code.co_filename.startswith(HOUSE)
        if frame.f_code is launch:
            while frame := frame.f_back:  # type: ignore[assignment]
                around += frame.f_code.co_filename.startswith(HOUSE)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert around
    return started, around


@pytest.mark.parametrize("in_place", [False, True])
def test_frames_of_the_backend(device: Device, in_place: bool) -> None:
    found = set()
    for count in (2, 54):
        grads = [torch.ones(4, 8 * k) for k in range(1, count + 1)]
        outs = grads if in_place else [None] * count
        axes = [(1,)] * count
        found.add(
            count_frames(
                device, lambda g=grads, o=outs, a=axes: _torch.centralize_many(g, a, 1.0, o, False)
            )
        )
    ((started, around),) = found
    assert started <= 24
    assert around <= 12


@pytest.mark.parametrize("in_place", [False, True])
def test_frames_of_the_public_function(device: Device, in_place: bool) -> None:
    """A list in the form of the last one is not checked again."""
    found = set()
    for count in (2, 54):
        grads = [torch.ones(4, 8 * k) for k in range(1, count + 1)]
        out = grads if in_place else None
        found.add(count_frames(device, lambda g=grads, o=out: gcx.centralize_many(g, out=o)))
    ((started, around),) = found
    assert started <= 20
    assert around <= 12
