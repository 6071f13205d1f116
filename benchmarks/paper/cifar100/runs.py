"""A run from its first epoch, or the last that is on the disk, to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.paper.cifar100.checkpoint import Checkpoint, load, save
from benchmarks.paper.cifar100.log import Epoch, write_log
from benchmarks.paper.cifar100.settings import Setting
from benchmarks.paper.cifar100.training import Data, Training

__all__ = ["complete", "log_of"]

_CHECKPOINT, _LOG = "checkpoint.pt", "log.csv"


def log_of(setting: Setting, study: Path) -> list[Epoch]:
    """Return the epochs of a run that are done; errors as `checkpoint.load`."""
    return load(study / setting.folder / _CHECKPOINT, setting).epochs


def complete(
    setting: Setting,
    data: Data,
    study: Path,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> list[Epoch]:
    """Run the epochs that are left; `tick` is called after each batch."""
    folder = study / setting.folder
    epochs, state = load(folder / _CHECKPOINT, setting)
    write_log(folder / _LOG, epochs)  # a kill may have come between the checkpoint and the log
    if len(epochs) == setting.epochs:
        return epochs
    training = Training(setting, data, device)
    if state:
        training.load_state_dict(state)
    for number in range(len(epochs) + 1, setting.epochs + 1):
        epochs.append(training.epoch(number, tick))
        state = training.state_dict() if number < setting.epochs else {}
        save(folder / _CHECKPOINT, setting, Checkpoint(epochs, state))
        write_log(folder / _LOG, epochs)
    return epochs
