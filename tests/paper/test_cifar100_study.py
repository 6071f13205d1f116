"""The study on CIFAR-100: its grid, its outcomes, its estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper.cells import BASE
from benchmarks.paper.cifar100 import checkpoint, driver
from benchmarks.paper.cifar100.archive import OFFICIAL, Archive, Split
from benchmarks.paper.cifar100.estimate import random_archive, spoken
from benchmarks.paper.cifar100.grid import CELLS, TABLE_1, TABLE_2, outcomes, settings
from benchmarks.paper.cifar100.log import Epoch
from benchmarks.paper.cifar100.runs import complete, log_of
from benchmarks.paper.cifar100.settings import Setting
from benchmarks.paper.cifar100.stand_ins import as_archive
from benchmarks.paper.cifar100.training import Data, Training
from benchmarks.paper.data import parts

from outcomes import arms
from small_cifar100 import CPU, SETTING, SMALL, checkpoint_of

# The grid


def test_the_cells_are_those_of_the_supplement():
    assert [(c.optimizer, c.learning_rate) for c in TABLE_1] == [("SGDM", 0.1)] * 5
    assert [c.weight_decay for c in TABLE_1] == [0, 1e-4, 2e-4, 5e-4, 1e-3]
    assert [(c.optimizer, c.learning_rate) for c in TABLE_2] == [
        ("SGDM", 0.05), ("SGDM", 0.1), ("SGDM", 0.2),
        ("Adam", 0.0005), ("Adam", 0.001), ("Adam", 0.0015),
    ]  # fmt: skip
    assert {c.weight_decay for c in TABLE_2} == {5e-4}
    assert len(CELLS) == 10
    assert set(CELLS) == {*TABLE_1, *TABLE_2}


@pytest.mark.parametrize(("layers", "arm"), [("conv", "conv only"), ("all", "gradient")])
def test_runs_have_folders_of_their_own(layers, arm):
    every = settings(seeds=3, epochs=2, layers=layers, scale=SMALL, precision="float32", data="")
    assert len(every) == len({setting.folder for setting in every}) == 10 * 2 * 3
    assert {setting.arm for setting in every} == {BASE, arm}
    assert [setting.seed for setting in every] == sorted(setting.seed for setting in every)


def test_outcomes_are_of_seeds_that_are_finished_in_both_arms():
    every = settings(seeds=3, epochs=2, layers="conv", scale=SMALL, precision="float32", data="")
    first, second = CELLS[:2]
    logs = {}
    for k, setting in enumerate(s for s in every if s.cell in (first, second)):
        logs[setting] = [Epoch(n, 1.0, 0.1, k + n / 10, 0.0, 0.0, 50.0 + k + n) for n in (1, 2)]
    missing = next(s for s in logs if s.cell == first and s.arm == BASE and s.seed == 1)
    logs[missing] = logs[missing][:1]
    for setting in logs:
        if setting.cell == second and setting.arm == "conv only":
            logs[setting] = []
    without, centralized = outcomes(logs)
    assert [(o.cell, o.arm) for o in (without, centralized)] == [
        (first, BASE), (first, "conv only"),
    ]  # fmt: skip
    for outcome in (without, centralized):
        assert outcome.seeds == (0, 2)
        np.testing.assert_array_equal(outcome.checkpoints, [1, 2])
        for row, seed in enumerate(outcome.seeds):
            log = logs[Setting(first, outcome.arm, seed, 2, SMALL, "float32", "")]
            np.testing.assert_array_equal(outcome.accuracy[row], [e.test_accuracy for e in log])
            np.testing.assert_array_equal(outcome.loss[row], [e.training_loss for e in log])


# The command


def study(written, write, **other):
    options = {"seeds": 2, "epochs": 1, "device": "cpu", "layers": "conv", "dry_run": False}
    options |= {"checksums": written.checksums, "scale": SMALL}
    return driver.run(written.folder, write, **options | other)


def test_the_whole_study(tmp_path, written, capsys, monkeypatch):
    so_far = []
    found = study(written, tmp_path, after_run=so_far.append)
    assert [len(o.seeds) for o in so_far[-1]] == [len(o.seeds) for o in found]
    assert len(so_far) == 40
    assert so_far[0] == []  # one arm alone
    assert [len(o.seeds) for o in so_far[1]] == [1, 1]
    assert {(o.cell, o.arm) for o in found} == {
        (cell, arm) for cell in CELLS for arm in (BASE, "conv only")
    }
    for outcome in found:
        assert outcome.seeds == (0, 1)
        assert outcome.accuracy.shape == outcome.loss.shape == (2, 1)
    assert len(list(tmp_path.rglob("log.csv"))) == 40
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 40
    assert printed[0].startswith("SGDM, learning rate 0.1, weight decay 0, without, seed 0: ")

    monkeypatch.delattr(Training, "epoch")  # nothing is left to do
    again = study(written, tmp_path)
    for old, new in zip(found, again, strict=True):
        assert (old.cell, old.arm) == (new.cell, new.arm)
        np.testing.assert_array_equal(old.accuracy, new.accuracy)


@pytest.mark.parametrize(("name", "classes"), [("MNIST", 10), ("Indian Pines", 13)])
def test_other_images_are_trained_on_as_those_of_the_archive(tmp_path, name, classes):
    archive = as_archive(name)
    assert archive.classes == classes == len(set(archive.train.labels))
    for split, samples in zip((archive.train, archive.test), parts(name), strict=True):
        assert (split.images.dtype, split.images.shape[1:]) == (np.uint8, (32, 32, 3))
        np.testing.assert_array_equal(split.labels, samples.y)
        seen = split.images[: len(samples.x), 12:20, 12:20, 0].reshape(len(samples.x), -1)
        edge = 12 - (32 - samples.x.shape[1]) // 2
        inside = samples.x[:, edge : edge + 8, edge : edge + 8, 0].reshape(len(seen), -1)
        assert np.corrcoef(seen.ravel(), inside.ravel())[0, 1] > 0.99
    few = [Split(s.images[:16], s.labels[:16]) for s in (archive.train, archive.test)]
    setting = replace(SETTING, epochs=1, data=name)
    data = Data.on(CPU, Archive(*few, classes))
    (epoch,) = complete(setting, data, tmp_path, CPU)
    assert np.isfinite(epoch.training_loss)
    assert log_of(setting, tmp_path) == [epoch]


def test_the_tables_name_other_images(tmp_path):
    (both,) = set(TABLE_1) & set(TABLE_2)
    found = arms(both, {"conv only": 1.0})
    paths = [*driver.sections(found, tmp_path, Path("Indian Pines"))]
    assert [path.name for path in paths] == [f"indian-pines-table{n}.md" for n in (1, 2)]
    assert all("CIFAR-100" not in path.read_text().splitlines()[0] for path in paths)


def test_other_settings_are_refused_before_anything_is_done(tmp_path, written, monkeypatch):
    last = settings(
        seeds=2, epochs=3, layers="conv", scale=SMALL, precision="float32",
        data=written.checksums.files["train"],
    )[-1]  # fmt: skip
    checkpoint.save(checkpoint_of(last, tmp_path), last, checkpoint.Checkpoint([], {}))
    with pytest.raises(CannotRunError, match="epochs 3 instead of 1"):
        study(written, tmp_path)
    assert list(tmp_path.rglob("log.csv")) == []


def test_a_bad_archive_is_refused_before_anything_is_done(tmp_path, written):
    with pytest.raises(CannotRunError, match=OFFICIAL.files["train"]):
        study(written, tmp_path, checksums=OFFICIAL)
    assert list(tmp_path.iterdir()) == []


def test_tables_are_written_of_cells_with_two_seeds(tmp_path):
    first, second = (arms(cell, {"conv only": 1.0}) for cell in CELLS[:2])
    few = [replace(o, seeds=(0,), accuracy=o.accuracy[:1], loss=o.loss[:1]) for o in second]
    assert list(driver.sections(few, tmp_path)) == []
    (path,) = driver.sections([*first, *few], tmp_path)
    assert path == tmp_path / "cifar-100-table1.md"
    (verdicts,) = [line for line in path.read_text().splitlines() if line.startswith("| verdict")]
    assert verdicts == "| verdict | helps | - | - | - | - |"


def test_an_unknown_device_is_said(tmp_path, written):
    with pytest.raises(CannotRunError, match="--device foo: torch knows no such device"):
        study(written, tmp_path, device="foo")


def test_a_device_that_it_does_not_run_on(tmp_path, written):
    with pytest.raises(CannotRunError, match="--device meta: it runs on no such device"):
        study(written, tmp_path, device="meta")


def test_a_gpu_that_is_not_there(tmp_path, written, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CannotRunError, match="--device cuda:1: torch finds 1 GPUs here"):
        study(written, tmp_path, device="cuda:1")


def test_a_missing_gpu_is_said(tmp_path, written, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(CannotRunError, match="--device cuda: torch finds no GPU"):
        study(written, tmp_path, device="cuda")


@pytest.mark.parametrize("has_data", [True, False])
def test_a_dry_run_prints_the_grid_and_the_time_and_writes_nothing(
    tmp_path, written, capsys, monkeypatch, has_data
):
    given = written if has_data else written._replace(folder=None)
    assert study(given, tmp_path / "out", dry_run=True, seeds=10, epochs=200) == []
    assert list(tmp_path.iterdir()) == []
    images, header, *lines = capsys.readouterr().out.splitlines()
    source = f"{given.folder}, which is the right archive" if has_data else "random"
    assert images == f"images: {source}"
    assert header.split("  ") == ["optimizer", "learning rate", "weight decay", "tables"]
    cells = [line.split(maxsplit=3) for line in lines[:10]]
    assert [(o, float(r), float(d)) for o, r, d, _ in cells] == [
        (c.optimizer, c.learning_rate, c.weight_decay) for c in CELLS
    ]
    assert [tables for *_, tables in cells].count("1, 2") == 1
    text = "\n".join(lines[10:])
    assert "arms: without, conv only; seeds: 0 to 9; epochs: 200; 200 runs" in text
    assert "finished runs: 0\n" in text
    assert "estimated time on " in text
    for what in ("an epoch", "a run", "all runs", "what is left to do"):
        assert f" {what} " in text


def test_the_estimate_multiplies(tmp_path, written, capsys, monkeypatch):
    monkeypatch.setattr(driver, "seconds_of_an_epoch", lambda *_: 36.0)
    study(written, tmp_path, dry_run=True, seeds=10, epochs=200)
    text = capsys.readouterr().out
    assert "an epoch 36.0 s, a run 2 h" in text
    assert "all runs 16 d 16 h" in text


def test_what_is_finished_is_not_estimated(tmp_path, written, data, capsys, monkeypatch):
    setting, *_ = settings(
        seeds=1, epochs=2, layers="conv", scale=SMALL, precision="float32",
        data=written.checksums.files["train"],
    )  # fmt: skip
    complete(setting, data, tmp_path, CPU)
    capsys.readouterr()
    monkeypatch.setattr(driver, "seconds_of_an_epoch", lambda *_: 90.0)
    study(written, tmp_path, dry_run=True, seeds=1, epochs=2)
    text = capsys.readouterr().out
    assert "finished runs: 1\n" in text
    assert "all runs 1 h\n" in text
    assert "what is left to do 57 min" in text


def test_random_images_are_as_many_as_the_real_ones():
    archive = random_archive()
    assert archive.train.images.shape == (50_000, 32, 32, 3)
    assert archive.test.images.shape == (10_000, 32, 32, 3)
    assert archive.classes == 100


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (59.4, "59.4 s"), (61, "1 min"), (7260, "2 h 1 min"), (90061, "1 d 1 h")],
)
def test_times_are_written_for_people(seconds, words):
    assert spoken(seconds) == words
