"""The `xp` fixture: the same test on every array library that the run asked for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

import libraries
from example_sessions import SESSIONS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        default=None,
        help=(
            "array libraries to test, separated by commas, from: "
            f"{', '.join(libraries.MAKERS)}. One that does not run is a failure. "
            "Default: those installed."
        ),
    )
    parser.addoption(
        "--packages",
        default="",
        help="further packages, separated by commas, whose absence is a failure and not a skip",
    )
    parser.addoption(
        "--examples",
        choices=list(SESSIONS),
        help="the session of nox whose examples to run, if tests/examples is collected; "
        "default: all whose packages are installed",
    )


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("--backends")
    names = asked.split(",") if asked else [n for n in libraries.MAKERS if libraries.installed(n)]
    unknown = set(names) - set(libraries.MAKERS)
    if unknown:
        msg = f"--backends: no library {sorted(unknown)}; there are {list(libraries.MAKERS)}"
        raise pytest.UsageError(msg)
    config.stash[_NAMES] = names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.config.stash[_NAMES]
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", names)
    if "package_name" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--packages")
        metafunc.parametrize("package_name", asked.split(",") if asked else [])
    if {"xp", "pair"} & set(metafunc.fixturenames):
        found = [library for name in names for library in libraries.MAKERS[name]()]
        if "xp" in metafunc.fixturenames:
            metafunc.parametrize("xp", [_param(library) for library in found])
        else:  # every two of them; of one library, none
            metafunc.parametrize("pair", [_param(*two) for two in combinations(found, 2)])


@pytest.fixture(params=["gradient", "update"])
def where(request: pytest.FixtureRequest) -> Any:
    """Run the test on gradients and on updates, unless it chooses for itself."""
    return request.param


@pytest.fixture(scope="module")
def compiled_in_haste() -> Iterator[None]:
    """Programs that run once, and whose last bits nobody looks at: XLA takes longer than they."""
    jax = pytest.importorskip("jax")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # the next module's programs are its own


def _param(*together: libraries.ArrayLibrary) -> Any:
    marks = []
    if len(together) == 1:
        marks.append(pytest.mark.one_framework)
    if any(library.device != "cpu" for library in together):
        marks.append(pytest.mark.gpu)
    value = together if len(together) > 1 else together[0]
    return pytest.param(value, id="+".join(map(str, together)), marks=marks)


_NAMES = pytest.StashKey[list[str]]()
