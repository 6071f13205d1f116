"""The campaign of mutants, on a small package: one is killed, one survives, and one hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.mutants import run

FILES = {
    "gcx/__init__.py": "",
    "gcx/small.py": """
def scale(x):
    return x * 1

def wait(done):
    while not done:
        pass
""",
    "tests/conftest.py": """
import __main__

__main__.PATIENCE = 0.5

def pytest_addoption(parser):
    parser.addoption("--backends")
""",
    "tests/test_small.py": """
from gcx.small import scale, wait

def test_scale():
    assert scale(3) == 3

def test_wait():
    wait(True)
""",
    "pyproject.toml": "[tool.mutmut]\nsource_paths = ['gcx']\ntrack_dependencies = false",
    "groups.toml": "[all]\nmodules = 'small'\ntests = 'test_small'\nlibraries = 'numpy'",
    "docs/index.md": "",
    "README.md": "",
    "noxfile.py": "",
}


def test_a_mutant_is_killed_or_survives_or_hangs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "benchmarks").symlink_to(Path(run.__file__).parents[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "GROUPS", tmp_path / "groups.toml")
    assert main(["mutants", "--write", "."]) == 0
    row = "| `small` | 3 | 3 | 2 | 66.7% |\n"
    assert row in capsys.readouterr().out
    assert row in Path("mutants.md").read_text()
    shown = Path("mutants.txt").read_text()
    assert shown.endswith("\n\nsmall.scale  (open)\n- return x * 1\n+ return x / 1\n")
    lines = Path("mutants/results.jsonl").read_text().splitlines()
    killers = {after: killer for (_, _, after), killer in map(json.loads, lines)}
    assert killers == {
        "return x / 1": None,
        "return x * 2": "tests/test_small.py::test_scale",
        "while done:": "took too long",
    }
