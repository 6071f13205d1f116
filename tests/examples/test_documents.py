"""The code in README.md and docs/ runs and prints as shown."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from example_sessions import imported, is_chosen

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> Iterator[tuple[int, str, str | None]]:
    """Line number and text of each fenced block, and the text block right below: the output."""
    text = page.read_text(encoding="utf-8")
    fenced = rf"^```{language}\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?"
    for block in re.finditer(fenced, text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start()) + 1, block[1], block[2]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "code" in metafunc.fixturenames:
        chosen = [
            pytest.param("\n" * line + code, output, id=f"{page.name}:{line}")
            for page in PAGES
            for line, code, output in blocks(page, "python")
            if is_chosen(metafunc.config, code)
        ]
        metafunc.parametrize(("code", "output"), chosen)


# torch.compile imports what warns of itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_python_block_runs(
    code: str,
    output: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    assert output in (None, capsys.readouterr().out)


def test_pages_are_short() -> None:
    words = {page: len(page.read_text(encoding="utf-8").split()) for page in PAGES}
    assert words.pop(README) <= 900
    assert [page.name for page in words if words[page] > 2000] == []


def test_readme_has_a_block_for_every_library() -> None:
    found = set().union(*[imported(code) for _, code, _ in blocks(README, "python")])
    assert found >= {"numpy", "torch", "jax", "optax", "cupy"}


def test_ci_runs_the_commands_of_the_readme() -> None:
    lines = "".join(block for _, block, _ in blocks(README, "console")).splitlines()
    commands = [line.removeprefix("$ ") for line in lines if "nox -s" in line]
    assert len(commands) == 2
    assert [command for command in commands if command not in (ROOT / ".ci/run").read_text()] == []
