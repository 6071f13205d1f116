"""The Python frames between a torch optimizer's step and the backend, on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

import gcx.torch

__all__ = ["Frames", "frames_of_a_step"]

_GCX = Path(gcx.__file__).parent


class Frames(NamedTuple):
    """The calls of functions in gcx/ during one step, in their order, as file and function."""

    calls: tuple[tuple[str, str], ...]

    @property
    def above_the_backend(self) -> int:
        """Number of frames outside of gcx/backends/."""
        return sum(not file.startswith("backends") for file, _ in self.calls)

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the frames, each once."""
        return tuple(dict.fromkeys(file for file, _ in self.calls))


def frames_of_a_step(where: Any = "gradient", layers: int = 4, **options: Any) -> Frames:
    """Count the frames of one step of SGD, by default a plain one on four linear layers.

    Nothing has changed since the step before: same parameters, same options, new gradients. A
    generator counts once for each time that it goes on, and a comprehension as a frame of its own
    where Python makes one.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    gcx.torch.centralize(optimizer, model, where=where)
    calls: list[tuple[str, str]] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(_GCX):
            calls.append((path.relative_to(_GCX).as_posix(), frame.f_code.co_qualname))

    for _ in range(3):  # all that is made once has been made
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        calls.clear()
        sys.setprofile(profile)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    return Frames(tuple(calls))
