"""The `xp` fixture: the same test on every array library that the run asked for.

A file of tests is skipped where a package is missing that it needs; test_canary asks for those of
the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import libraries
from example_sessions import SESSIONS

# The files of tests that need a package.
MODELS = "*/test_jax_layers_* *_muon.py"
NEEDS = {
    "torch": "*torch* */test_processes.py */kernels/* *_deepspeed.py",
    "optax": "*jax* *optax*",
    **dict.fromkeys(("flax", "haiku", "equinox"), MODELS),
    "ml_dtypes": "*/kernels/* *_cuda.py",
    "cuda": "*/kernels/*",
    "cupy": "*/test_cupy_cuda.py",
    "deepspeed": "*_deepspeed.py",
    "mutmut": "*/test_mutants.py",
    "keras": "*/around_keras/*",
    "thinc": "*/around_thinc/*",
}


class Module(pytest.Module):
    """A file of tests; one that needs a framework alone is marked so."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        path = self.path.relative_to(Path(__file__).parents[1]).as_posix()
        packages = [p for p, globs in NEEDS.items() if any(fnmatch(path, g) for g in globs.split())]
        for package in packages:
            if find_spec(package) is None:
                pytest.skip(f"needs {package}", allow_module_level=True)
        if len(packages) == 1:
            self.add_marker(pytest.mark.one_framework)
        if "optax" in packages:
            import jax

            jax.config.update("jax_enable_x64", True)  # as tests/libraries.py does
        return super().collect()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Module:
    return Module.from_parent(parent, path=module_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    names = ", ".join(libraries.MAKERS)
    backends = f"array libraries to test, which must all run; default: those installed of {names}"
    packages = "further packages, separated by commas, whose absence is a failure and not a skip"
    examples = "the session of nox whose examples to run; default: all that have their packages"
    parser.addoption("--backends", help=backends)
    parser.addoption("--packages", default="", help=packages)
    parser.addoption("--examples", choices=list(SESSIONS), help=examples)


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("--backends")
    names = asked.split(",") if asked else [n for n in libraries.MAKERS if libraries.installed(n)]
    if unknown := {*names} - {*libraries.MAKERS}:
        raise pytest.UsageError(f"--backends: no {min(unknown)!r}, but {[*libraries.MAKERS]}")
    config.stash[_NAMES] = names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.config.stash[_NAMES]
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", names)
    if "package_name" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--packages")
        metafunc.parametrize("package_name", asked.split(",") if asked else [])
    if {"xp", "pair"} & set(metafunc.fixturenames):
        found = getattr(metafunc.module, "LIBRARIES", None)  # of a file, whatever is asked for
        found = found or [library for name in names for library in libraries.MAKERS[name]()]
        if "xp" in metafunc.fixturenames:
            metafunc.parametrize("xp", [_param(library) for library in found])
        else:  # every two of them; of one library, none
            metafunc.parametrize("pair", [_param(*two) for two in combinations(found, 2)])


@pytest.fixture(params=["gradient", "update"])
def where(request: pytest.FixtureRequest) -> Any:
    """Run the test on gradients and on updates, unless it chooses for itself."""
    return request.param


@pytest.fixture
def writable(xp: libraries.ArrayLibrary) -> libraries.ArrayLibrary:
    if not xp.is_writable:
        pytest.skip("its arrays cannot be written to")
    return xp


@pytest.fixture
def layer() -> Any:
    """A small dense layer of torch in float64."""
    from torch_training import new_layer

    return new_layer()


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a device of torch_kernels as the file of the test does; it is emulated by default."""
    return request.module.make_device(getattr(request, "param", "emulated"), monkeypatch)


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
