"""The command: options that go together, folders that can be written, and where things are."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import command, small_data
from benchmarks.paper.cifar100 import driver

from outcomes import TABLE_1, arms


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    """What the command asks of the two studies, neither of which runs."""
    seen: dict = {}

    def small_data_(parts, folder, **others):
        seen.update(parts=parts, folder=folder, **others)
        return iter([])

    def cifar100(data, folder, **others):
        seen.update(data=data, folder=folder, **others)
        return []

    monkeypatch.setattr(small_data, "sections", small_data_)
    monkeypatch.setattr(driver, "run", cifar100)
    monkeypatch.chdir(tmp_path)
    return seen


def test_small_data_by_default(asked: dict) -> None:
    assert command.main([]) == 0
    assert asked == {
        "parts": command.PARTS, "folder": Path("paper-results"), "seeds": None, "hardly": False,
    }  # fmt: skip


def test_a_brief_study_says_so_and_does_not_write_over_the_whole_one(
    asked: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, folder in ((), "paper-results"), (("--write", "report"), "report"):
        assert command.main(["--brief", *options]) == 0
        assert asked["folder"] == Path(folder, "brief")
        assert "A short run" in capsys.readouterr().out


def test_cifar_100_as_in_the_paper_by_default(asked: dict) -> None:
    assert command.main(["--data", "images"]) == 0
    after_run = asked.pop("after_run")
    assert asked == {
        "data": Path("images"), "folder": Path("paper-results/runs"), "seeds": 5, "epochs": 200,
        "layers": "conv", "device": "cuda", "dry_run": False,
    }  # fmt: skip
    after_run(arms(TABLE_1[0], {"gradient": 1.0}))  # of no cell of CIFAR-100
    assert [path.name for path in Path("paper-results").iterdir()] == []


def test_other_images_have_a_folder_of_their_own(asked: dict) -> None:
    assert command.main(["--data", "Indian Pines"]) == 0
    assert (asked["data"], asked["folder"]) == (
        Path("Indian Pines"),
        Path("paper-results/Indian Pines/runs"),
    )


def test_a_dry_run_makes_no_folder(asked: dict, tmp_path: Path) -> None:
    assert command.main(["--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--epochs", "3", "--layers", "all"], "on small data, .*: --epochs, --layers"),
        (["--device", "cpu"], "on small data, .*: --device"),
        (["--only", "energy", "--seeds", "3"], "on energy, theory and drift, .*: --seeds"),
        (["--data", "images", "--brief"], "on CIFAR-100 .*: --brief"),
        (["--dry-run", "--only", "table1"], "on CIFAR-100 .*: --only"),
    ],
)
def test_options_of_no_effect_are_refused(
    options: list[str], refused: str, asked: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(options)
    assert asked == {}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(f"of no effect {refused}$", line)


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("--epochs", "0", 1), ("--epochs", "1.5", 1), ("--seeds", "1", 2), ("--seeds", "many", 2)],
)
def test_numbers_that_are_too_low(
    option: str, value: str, least: int, asked: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["--data", "images", option, value])
    assert f"is not a whole number of {least} or more" in capsys.readouterr().err


def test_a_folder_that_is_none_is_said_before_anything_is_done(
    asked: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command.main(["--write", "file/below"]) == 2
    assert asked == {}
    assert "--write file/below: no file can be written there" in capsys.readouterr().err


def test_ctrl_c_ends_the_programs_that_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "paper", "--only", "kinds", "--brief"]
    # A process inherits it if this one ignores the signal, as a background job does.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [*command, "--write", str(tmp_path)],
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        signal.signal(signal.SIGINT, before)
        assert process.stderr is not None
        printed = ""
        while "trainings" not in printed:
            assert process.poll() is None
            printed += process.stderr.read(1)
        os.killpg(process.pid, signal.SIGINT)
        assert "programs that were finished are kept" in process.stderr.read()
    assert process.returncode == 130
