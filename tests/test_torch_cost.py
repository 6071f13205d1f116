"""Python calls in a step: few, and none for each weight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import gcx
import gcx.torch

HOUSE = str(Path(gcx.__file__).parent)


def calls(function: Callable[[], object]) -> list[str]:
    """Files of the Python frames in gcx, one for each call."""
    found: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOUSE):
            found.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def trained(layers: int, **options: Any) -> SGD:
    """An optimizer after its first step."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    optimizer = SGD(model.parameters(), lr=0.1, **options)
    gcx.torch.centralize(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_step_calls_few_functions_in_few_files(options: dict[str, float]) -> None:
    found = calls(trained(4, **options).step)
    assert len(found) <= 30
    assert len(set(found)) <= 6


def test_step_calls_no_function_for_each_weight() -> None:
    assert len(calls(trained(40).step)) == len(calls(trained(4).step))
