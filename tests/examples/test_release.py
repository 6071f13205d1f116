"""Files that name the same thing agree: hooks, workflows, sessions, the version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import gcx

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sessions_of(noxfile: str) -> set[str]:
    return set(re.findall(r"^@nox.*\ndef (\w+)\(session", noxfile, re.MULTILINE))


def test_ruff_is_the_same_before_a_commit_and_in_ci() -> None:
    (pinned,) = tomllib.loads(read("pyproject.toml"))["dependency-groups"]["lint"]
    (hook,) = re.findall(r"rev: v(\S+)", read(".pre-commit-config.yaml"))
    assert pinned == f"ruff=={hook}"


def test_hosted_checks_run_every_session() -> None:
    workflow = read(".github/workflows/checks.yml")
    listed = ",".join(re.findall(r"session: \[?([^]}]+)", workflow))
    named = {name.split()[0] for name in listed.split(",")}
    # `extras` requires `wheel`, `site` builds the docs, `demo` compares the frameworks; `mutants`
    # takes hours
    assert named == sessions_of(read("noxfile.py")) - {"wheel", "docs", "check", "mutants"}


def test_changelog_knows_the_version() -> None:
    release = gcx.__version__.partition(".dev")[0]
    assert f"## [{release}]" in read("CHANGELOG.md")
    assert len(read("CHANGELOG.md").split()) <= 700


def test_build_reads_the_version_where_users_do() -> None:
    path = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'^__version__ = "(.+?)"', read(path), re.MULTILINE) == [gcx.__version__]
