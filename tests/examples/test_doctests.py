"""The examples in docstrings run, in every module that has some."""

from __future__ import annotations

import ast
import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import gcx

from example_sessions import is_chosen

PACKAGE = Path(gcx.__file__).parent


def needed_code(path: Path) -> str:
    """Imports of a module: of the module itself, at its top, and in its examples."""
    text = path.read_text(encoding="utf-8")
    at_the_top = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
    in_examples = re.findall(r">>> ((?:import|from) .*)", text)
    return "\n".join([f"import {module_name(path)}", *map(ast.unparse, at_the_top), *in_examples])


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [
        module_name(path)
        for path in sorted(PACKAGE.rglob("*.py"))
        if ">>>" in path.read_text(encoding="utf-8")
        if is_chosen(metafunc.config, needed_code(path))
    ]
    metafunc.parametrize("module", chosen)


def test_examples_run(module: str) -> None:
    results = doctest.testmod(import_module(module))
    assert results.attempted
    assert not results.failed
