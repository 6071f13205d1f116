"""``python -m benchmarks figures`` counts what it says."""

from __future__ import annotations

import ast
import json

import pytest

from benchmarks import figures
from benchmarks.__main__ import main

SOURCES = {
    "gcx": "from gcx.layout import Layout",
    "gcx.layout": "",
    "gcx.backends": "",
    "gcx.backends._numpy": "from gcx import layout\nfrom gcx.backends import load",
    "gcx._dispatch": "def find():\n    from gcx.backends import _numpy",
    "gcx.torch._hooks": "import torch\nfrom gcx._dispatch import backend_for",
}


def imports_of(*, at_run_time: bool = True, **changed: str) -> dict[str, set[str]]:
    sources = SOURCES | {f"gcx.{name.replace('__', '.')}": text for name, text in changed.items()}
    modules = {name: ast.parse(text) for name, text in sources.items()}
    return figures.imports_between(modules, at_run_time=at_run_time)


def test_imports() -> None:
    assert imports_of() == {
        "gcx": {"gcx.layout"},
        "gcx.layout": set(),
        "gcx.backends": set(),
        "gcx.backends._numpy": {"gcx.layout", "gcx.backends"},
        "gcx._dispatch": {"gcx.backends._numpy"},
        "gcx.torch._hooks": {"gcx._dispatch"},
    }


def test_upward_imports() -> None:
    assert figures.upward_imports(imports_of()) == []
    up = imports_of(backends="def load():\n    from gcx.torch import _hooks")
    assert figures.upward_imports(up) == ["gcx.backends -> gcx.torch._hooks"]


def test_cycles() -> None:
    assert figures.cycles(imports_of()) == []
    around = imports_of(backends="from gcx import _dispatch")
    assert figures.cycles(around) == ["gcx._dispatch <-> gcx.backends <-> gcx.backends._numpy"]


def test_imports_for_types() -> None:
    text = "if TYPE_CHECKING:\n    from gcx.backends import _numpy"
    assert figures.cycles(imports_of(layout=text)) == []
    assert figures.cycles(imports_of(layout=text, at_run_time=False)) == [
        "gcx.backends._numpy <-> gcx.layout"
    ]


def test_function_lengths() -> None:
    text = '''
def outer():
    """Documented,
    in two lines."""
    x = 1

    def inner(): return x
    return inner

class C:
    def method(self):
        """Nothing else."""
'''
    assert sorted(figures.function_lengths(ast.parse(text))) == [0, 1, 4]


def test_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["imports that run upwards"] == []
    assert shown["import cycles"] == []
    assert shown["lines in the wheel, CUDA and docstrings included"] > 5000
    assert "backends/_torch.py" in shown["files of these frames"]
    assert 4 <= shown["frames above the backend"] < shown["frames of a CPU step in gcx"]
