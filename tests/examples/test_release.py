"""Files that name the same thing agree: hooks, workflows, sessions, the version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import gcx

from example_sessions import SESSIONS

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


NOXFILE, PYPROJECT = read("noxfile.py"), tomllib.loads(read("pyproject.toml"))
SESSIONS_OF_NOX = set(re.findall(r"^@nox.*\ndef (\w+)\(session", NOXFILE, re.MULTILINE))
# `demo` compares the frameworks, too; `extras` requires `wheel`; `site` builds the docs; `mutants`
# takes hours.
IN_CI = SESSIONS_OF_NOX - {"wheel", "docs", "mutants"}


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
