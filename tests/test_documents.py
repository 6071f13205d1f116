"""The code in README.md and docs/ runs as it stands, and CI runs the commands of README.md."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import libraries

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

# The library that must run here for a block that imports the module.
LIBRARY_OF = {"numpy": "numpy", "torch": "torch", "jax": "jax", "optax": "jax", "cupy": "cupy"}

# Packages that are not everywhere where their framework is.
PACKAGES = {
    "accelerate", "equinox", "flax", "haiku", "keras", "lightning", "mlx", "sklearn", "spacy",
    "thinc", "transformers",
}  # fmt: skip


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start()) + 1, block[1]


def imported(code: str) -> set[str]:
    """Parts of the names of all modules that the code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= set(str(node.module).split("."))
    return found


def needs(code: str) -> set[str]:
    """Libraries without which the code does not run."""
    return {LIBRARY_OF[name] for name in imported(code) & set(LIBRARY_OF)}


def absent(code: str) -> list[str]:
    """What the code needs, and is not here."""
    lacking = {name for name in needs(code) if not libraries.installed(name)}
    return sorted(lacking | {name for name in imported(code) & PACKAGES if not find_spec(name)})


PYTHON_BLOCKS = [
    pytest.param("\n" * line + code, id=f"{page.name}:{line}")
    for page in PAGES
    for line, code in blocks(page, "python")
]


# torch.compile imports what warns of itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_python_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if absent(code):
        pytest.skip(f"needs {', '.join(absent(code))}")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


def test_readme_has_a_block_for_every_library() -> None:
    found = [needs(code) for _, code in blocks(README, "python")]
    assert set().union(*found) == set(LIBRARY_OF.values())


def test_ci_runs_the_commands_of_the_readme() -> None:
    lines = "".join(block for _, block in blocks(README, "console")).splitlines()
    commands = [line.removeprefix("$ ") for line in lines if "nox -s" in line]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(commands) == 2
    assert [command for command in commands if command not in ci] == []
