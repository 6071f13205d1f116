"""The code in README.md and docs/ runs and prints as shown, and files that name a thing agree."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import gcx

from example_sessions import SESSIONS, imported, is_chosen

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


NOXFILE, PYPROJECT = read("noxfile.py"), tomllib.loads(read("pyproject.toml"))
SESSIONS_OF_NOX = set(re.findall(r"^@nox.*\ndef (\w+)\(session", NOXFILE, re.MULTILINE))
# `demo` compares the frameworks, too; `extras` requires `wheel`; `site` builds the docs; `mutants`
# takes hours.
IN_CI = SESSIONS_OF_NOX - {"check", "wheel", "docs", "mutants"}


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
    assert [command for command in commands if command not in read(".ci/run")] == []


def test_ci_and_hosted_checks_run_every_session() -> None:
    assert set(re.findall(r"nox -(?:s|k \") ?(\w+)", read(".ci/run"))) == IN_CI
    listed = re.findall(r"session: \[?([^]}]+)", read(".github/workflows/checks.yml"))
    assert {name.split()[0] for name in ",".join(listed).split(",")} == IN_CI


def test_nox_names_every_folder_that_pytest_passes_by() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    named = set(re.findall(r"tests/(\w+)[\"/{]", NOXFILE))
    around = {folder for folder in folders if folder.startswith("around_")}
    keys = re.findall(r'^    "(\w+)": \(', NOXFILE, re.MULTILINE)
    assert around == {f"around_{key}" for key in keys}
    assert folders - around <= named


def test_nox_has_a_session_for_every_example() -> None:
    """An example that no session has the packages for is an error where the tests are collected."""
    assert set(re.findall(r"--examples=(\w+)", NOXFILE)) == set(SESSIONS)


def test_ruff_is_the_same_before_a_commit_and_in_ci() -> None:
    (hook,) = re.findall(r"rev: v(\S+)", read(".pre-commit-config.yaml"))
    assert PYPROJECT["dependency-groups"]["lint"] == [f"ruff=={hook}"]


def test_changelog_and_build_know_the_version() -> None:
    changelog = read("CHANGELOG.md")
    assert f"## [{gcx.__version__.partition('.dev')[0]}]" in changelog
    assert len(changelog.split()) <= 700
    text = read(PYPROJECT["tool"]["hatch"]["version"]["path"])
    assert re.findall(r'^__version__ = "(.+?)"', text, re.MULTILINE) == [gcx.__version__]
