"""``python -m benchmarks``: what its commands have in common."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import COMMANDS, main
from benchmarks.agreement import numbers
from benchmarks.command import progress
from benchmarks.command.libraries import double_precision

ROOT = Path(__file__).parents[2]


def test_without_a_command_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"jax-axes": ["haiku", "flax", "equinox"], "keras-axes": ["keras"]}
    for package in needed.get(name, []):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {name}")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark"])
    assert "invalid choice: 'benchmark'" in capsys.readouterr().err


def test_help_loads_no_framework() -> None:
    code = "import sys; from benchmarks.__main__ import main; main([]); print(*sys.modules)"
    modules = ran(sys.executable, "-c", code).stdout.decode().split()
    assert "gcx" in modules
    assert not {"numpy", "torch", "jax", "cupy"} & set(modules)


def test_it_is_a_command_of_python() -> None:
    shown = ran(sys.executable, "-m", "benchmarks", "agreement", "--seed", "many")
    assert shown.returncode == 2
    assert b"'many' is not a whole number" in shown.stderr


def test_interruption_leaves_no_traceback() -> None:
    code = """
import os, signal
from functools import partial
from benchmarks.__main__ import main
from benchmarks.agreement import numbers
from gcx.__main__ import exit_after

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
numbers.run = lambda _: os.kill(os.getpid(), signal.SIGINT)
exit_after(partial(main, ["agreement"]))
"""
    shown = ran(sys.executable, "-c", code)
    assert (shown.returncode, shown.stdout, shown.stderr) == (130, b"", b"")


@pytest.mark.parametrize(
    ("command", "module", "install"),
    [
        ("agreement", "numpy", 'pip install "gcx[numpy]"'),
        ("throughput --plot speed.png", "matplotlib", "pip install matplotlib"),
        ("gpu", "torch", 'pip install "gcx[numpy,torch]"'),
        ("demo", "numpy", "pip install --group demo"),
        ("demo", "sklearn", "pip install --group demo"),
        ("demo", "matplotlib", "pip install --group demo"),
    ],
)
def test_missing_package_is_one_clear_line(
    command: str,
    module: str,
    install: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for needed in ("sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, needed, SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, None)
    assert main([*command.split(), "--json"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert f"this needs {module}" in err
    assert install in err
    assert install in json.loads(out)["error"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("info.txt", "must end in .json"), ("nowhere/info.json", "there is no folder nowhere")],
)
def test_json_that_cannot_be_written(
    path: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numbers, "run", pytest.fail)
    assert main(["agreement", "--json", path]) == 2
    assert reason in capsys.readouterr().err


def ran(*command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def test_bar_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert list(progress.track("abcd", "working")) == list("abcd")
        lines = terminal.getvalue().split("\r\x1b[K")
        assert lines[1] == f"working [{' ' * 30}] 0/4"
        assert lines[3] == f"working [{'#' * 15}{' ' * 15}] 2/4"
        assert lines[-1] == ""

    def test_interruption_clears_the_bar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        items = progress.track("abcd", "working")
        next(items)
        items.close()
        assert terminal.getvalue().endswith("\r\x1b[K")

    def test_nothing_where_nobody_looks(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert list(progress.track("abcd", "working")) == list("abcd")
        assert capsys.readouterr() == ("", "")


def test_double_precision_ends_with_the_block() -> None:
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        with double_precision(["numpy", "jax"]):
            assert jax.numpy.ones(1).dtype == "float64"
        assert jax.numpy.ones(1).dtype == "float32"
    finally:
        jax.config.update("jax_enable_x64", before)
