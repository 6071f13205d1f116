"""Runs on CIFAR-100 that are killed and go on, their checkpoints and logs."""

from __future__ import annotations

import csv
import io
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper.cells import BASE
from benchmarks.paper.cifar100 import checkpoint
from benchmarks.paper.cifar100.log import Epoch
from benchmarks.paper.cifar100.runs import complete, log_of
from benchmarks.paper.cifar100.settings import PAPER, Setting
from benchmarks.paper.cifar100.training import Training

from killed_cifar100 import die_before_log, die_in_save, die_in_step, run_until_killed
from small_cifar100 import CELL, CPU, SETTING, SMALL, TRAIN, checkpoint_of

STEPS = TRAIN // SMALL.batch  # of an epoch


def timeless(epochs: list[Epoch]) -> list[Epoch]:
    return [epoch._replace(seconds=0.0) for epoch in epochs]


def csv_rows(setting: Setting, study: Path) -> list[Epoch]:
    with (study / setting.folder / "log.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(Epoch._fields)
    return [Epoch(int(number), *map(float, rest)) for number, *rest in rows]


# A run that is killed


class Kill(NamedTuple):
    """The call, of what `place` says, at which the run dies, and the epochs that it has then."""

    optimizer: str
    place: Callable[[int], None]
    call: int
    kept: int


@pytest.mark.parametrize(
    "kill",
    [
        Kill("Adam", die_in_step, 2 * STEPS + 3, kept=2),
        Kill("SGDM", die_in_save, 3, kept=2),
        Kill("SGDM", die_before_log, 1 + 3, kept=3),  # it is written at the start too
    ],
    ids=lambda kill: kill.place.__name__,
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, written, data, kill):
    setting = replace(SETTING, cell=replace(CELL, optimizer=kill.optimizer, learning_rate=0.01))
    whole = complete(setting, data, tmp_path / "whole", CPU)

    study = tmp_path / "killed"
    end = run_until_killed(kill.place, kill.call, setting, written, study)
    assert end == -signal.SIGKILL
    assert timeless(log_of(setting, study)) == timeless(whole[: kill.kept])
    assert len(csv_rows(setting, study)) == 2

    ticks = []
    resumed = complete(setting, data, study, CPU, lambda: ticks.append(None))
    assert len(ticks) == (setting.epochs - kill.kept) * STEPS
    assert timeless(resumed) == timeless(whole)
    assert csv_rows(setting, study) == resumed  # each epoch once
    names = {path.name for path in (study / setting.folder).iterdir()}
    assert names == {"checkpoint.pt", "log.csv"}


@pytest.mark.parametrize("arm", [BASE, "conv only"])
@pytest.mark.parametrize("optimizer", ["SGDM", "Adam"])
def test_a_checkpoint_holds_every_bit(tmp_path, data, optimizer, arm):
    setting = replace(SETTING, cell=replace(CELL, optimizer=optimizer), arm=arm)
    whole, resumed = (Training(setting, data, CPU) for _ in range(2))
    path = tmp_path / "checkpoint.pt"
    first = whole.epoch(1, lambda: None)
    checkpoint.save(path, setting, checkpoint.Checkpoint([first], whole.state_dict()))
    epochs, state = checkpoint.load(path, setting)
    assert epochs == [first]
    resumed.load_state_dict(state)
    for number in (2, 3):
        rows = [t.epoch(number, lambda: None) for t in (whole, resumed)]
        assert timeless(rows[:1]) == timeless(rows[1:])
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_finished_run_is_not_run_again_and_keeps_no_weights(tmp_path, data, monkeypatch):
    first = complete(SETTING, data, tmp_path, CPU)
    assert checkpoint.load(checkpoint_of(SETTING, tmp_path), SETTING).state == {}
    assert csv_rows(SETTING, tmp_path) == first
    monkeypatch.delattr(Training, "epoch")
    assert complete(SETTING, data, tmp_path, CPU) == first


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"epochs": 5}, "epochs 4 instead of 5"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"data": "other"}, "data '' instead of 'other'"),
        ({"precision": "bfloat16"}, "precision 'float32' instead of 'bfloat16'"),
        ({"scale": PAPER}, "'batch': 8"),
        ({"cell": replace(CELL, weight_decay=0.0)}, "'weight_decay': 0.0005"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, other, words):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, SETTING, checkpoint.Checkpoint([], {}))
    before = path.read_bytes()
    with pytest.raises(CannotRunError, match=words) as error:
        checkpoint.load(path, replace(SETTING, **other))
    assert str(path) in str(error.value)
    assert path.read_bytes() == before


def foreign() -> bytes:
    """A checkpoint of something else."""
    content = io.BytesIO()
    torch.save({"epoch": 3, "model": {}}, content)
    return content.getvalue()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text", lambda b: foreign()],
    ids=["half", "empty", "text", "foreign"],
)
def test_an_unreadable_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, SETTING, checkpoint.Checkpoint([], {"weight": torch.ones(100)}))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CannotRunError, match=f"{path} is no whole checkpoint: delete it"):
        checkpoint.load(path, SETTING)


def test_a_checkpoint_runs_no_code(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"setting": SimpleNamespace()}, path)
    with pytest.raises(CannotRunError, match="no whole checkpoint"):
        checkpoint.load(path, SETTING)
