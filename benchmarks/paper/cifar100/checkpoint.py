"""From what a run that was killed goes on."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper.cifar100.log import Epoch
from benchmarks.paper.cifar100.settings import Setting
from benchmarks.paper.files import write_whole

__all__ = ["Checkpoint", "load", "save"]


class Checkpoint(NamedTuple):
    """The epochs so far, and what training goes on from: nothing before the first and at the end.

    So a run that is finished takes little of the disk.
    """

    epochs: list[Epoch]
    state: dict[str, Any]


def save(path: Path, setting: Setting, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in the place of the last one."""
    content = {
        "setting": asdict(setting),
        "epochs": [tuple(epoch) for epoch in checkpoint.epochs],
        "state": checkpoint.state,
    }
    write_whole(path, lambda file: torch.save(content, file))


def load(path: Path, setting: Setting) -> Checkpoint:
    """Read the checkpoint of a run; an empty one if there is none.

    Raises
    ------
    CannotRunError
        If it is of another run, or cannot be read.
    """
    if not path.exists():
        return Checkpoint([], {})
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, epochs, state = content["setting"], content["epochs"], content["state"]
    except (RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        # The words of torch advise to load what it does not trust.
        raise CannotRunError(
            f"{path} is no whole checkpoint: delete it, and the run starts again"
        ) from error
    _check(path, found, asdict(setting))
    return Checkpoint([Epoch(*row) for row in epochs], state)


def _check(path: Path, found: Mapping[str, object], asked: Mapping[str, object]) -> None:
    differing = [
        f"{name} {found.get(name)!r} instead of {value!r}"
        for name, value in asked.items()
        if found.get(name) != value
    ]
    if differing:
        raise CannotRunError(
            f"{path} is of a run with {', '.join(differing)}: ask for the same again, write "
            "elsewhere, or delete it"
        )
