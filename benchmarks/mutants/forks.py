"""A group of mutants: each runs the tests that reach it in a fork of one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from mutmut.mutation import trampoline
from mutmut.mutation.trampoline import set_mutant_under_test

_OPTIONS = (
    *("-q", "--no-showlocals", "--tb=no", "-pno:cacheprovider"),
    "-Wignore::pytest.PytestAssertRewriteWarning",
)
_FRAMEWORKS = ("numpy", "hypothesis", "torch", "jax", "optax", "flax.linen", "haiku", "equinox")
_ANEW = """
import sys, pytest
from mutmut.mutation import trampoline
trampoline.__name__ = "gcx.trampoline"
sys.exit(pytest.main(sys.argv[1:]))
"""
_BUDGET = 30.0  # seconds for the tests of one mutant
PATIENCE = 5.0  # how many times as long a mutant may take, that loops say

# The seconds of each test, and the functions that it reaches.
Reached = dict[str, tuple[float, list[str]]]


class Collected:
    """Tests that pytest collects before the first fork, which is the fastest way."""

    def __init__(self, session: pytest.Session, *, before_import: bool = False) -> None:
        self._session = session
        self._tests = {test.nodeid: test for test in session.items}
        # For these functions the mutant may have to be there before gcx is imported.
        self._at_import = set() if before_import else reached_so_far()

    def measure(self) -> Reached:
        """Run all tests; leave those out that fail."""
        self._be_quiet()
        found: Reached = {}
        for name in self._tests:
            reached_so_far()
            before = perf_counter()
            if self._passes(name):
                found[name] = perf_counter() - before, [*reached_so_far()]
        return found

    def find_killer(self, mutant: str, names: Sequence[str]) -> str | None:
        """Find the first test that fails; None if the mutant survives."""
        self._be_quiet()
        set_mutant_under_test(mutant)
        killer = next((name for name in names if not self._passes(name)), None)
        if killer is None and mutant.partition("__mutmut_")[0] in self._at_import:
            arguments = (a for a in self._session.config.invocation_params.args if a[0] == "-")
            command = [sys.executable, "-c", _ANEW, "-x", *arguments, *names]
            if subprocess.run(command, check=False).returncode:
                return "a new process"
        return killer

    def _be_quiet(self) -> None:
        self._session.config.pluginmanager.unregister(name="terminalreporter")

    def _passes(self, name: str) -> bool:
        failed = self._session.testsfailed
        test = self._tests[name]
        test.config.hook.pytest_runtest_protocol(item=test, nextitem=None)
        return self._session.testsfailed == failed


class Collecting:
    """Tests that each fork collects, since JAX must not have computed anything before a fork."""

    def __init__(self, arguments: Iterable[str]) -> None:
        self._options = [argument for argument in arguments if argument.startswith("-")]
        self._files = [argument for argument in arguments if not argument.startswith("-")]

    def measure(self) -> Reached:
        """As `Collected.measure`."""
        found: list[Reached] = []

        def measure(session: pytest.Session) -> None:
            found.append(Collected(session).measure())

        pytest.main([*self._options, *self._files], plugins=[Loop(measure)])
        return found[0]

    def find_killer(self, mutant: str, names: Sequence[str]) -> str | None:
        """As `Collected.find_killer`."""
        set_mutant_under_test(mutant)
        found: list[str | None] = []

        def find(session: pytest.Session) -> None:
            tests = Collected(session, before_import=True)
            found.append(tests.find_killer(mutant, names))

        files = dict.fromkeys(map(_file, names))
        code = pytest.main([*self._options, *files], plugins=[Loop(find)])
        return found[0] if found else f"exit code {code}"


class Loop:
    """A plugin of pytest that has a loop of its own over the tests."""

    def __init__(self, run: Callable[[pytest.Session], None]) -> None:
        self._run = run

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Say that the tests have run."""
        self._run(session)
        return True


def run(mutants: Sequence[Sequence[str]], tests: Collected | Collecting, results: Path) -> None:
    """Write the killer of each mutant, or null."""
    set_mutant_under_test("stats")
    reached: Reached = in_fork(3600, tests.measure)
    seconds_of = {name: seconds for name, (seconds, _) in reached.items()}
    sizes = Counter(map(_file, reached))
    print(f"{len(mutants)} mutants, {len(reached)} tests, {sum(seconds_of.values()):.0f} s")
    kills: Counter[tuple[str, str]] = Counter()
    for mutant in mutants:
        function, module = mutant[0].partition("__mutmut_")[0], mutant[0].partition(".x")[0]
        costs: dict[str, dict[str, float]] = defaultdict(dict)
        for name, (seconds, hits) in reached.items():
            if function in hits:
                costs[_file(name)][name] = seconds
        # Those files first that kill much, or know the function best, in little time.
        worth = {
            file: (kills[module, file] + len(names) / sizes[file]) / (1 + sum(names.values()))
            for file, names in costs.items()
        }
        files = sorted(costs, key=lambda file: -worth[file])
        killer, left = None, _BUDGET
        for part in (files[:1], files[1:]):
            names = sorted((n for file in part for n in costs[file]), key=seconds_of.__getitem__)
            spent = [*accumulate(seconds_of[name] for name in names)]
            names = [name for name, total in zip(names, spent, strict=True) if total < left]
            if names and killer is None:
                limit = PATIENCE * (5 + spent[len(names) - 1])
                killer = in_fork(limit, tests.find_killer, mutant[0], names)
                left -= spent[len(names) - 1]
        kills[module, _file(killer or "")] += 1
        with results.open("a", encoding="utf-8") as file:
            print(json.dumps([mutant, killer]), file=file)


_reached: set[str] = set()


def reached_so_far() -> set[str]:
    """List the functions that ran since the last call, if no mutant is chosen."""
    found = {*_reached}
    _reached.clear()
    return found


def _record(name: str, **_: object) -> None:
    _reached.add(name)


def in_fork(limit: float, work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` returns in a child process, or why it does not."""
    reader, writer = _fork.Pipe(duplex=False)
    child = _fork.Process(target=_answer, args=(writer, work, arguments))
    child.start()
    writer.close()
    try:
        return reader.recv() if reader.poll(limit) else "took too long"
    except EOFError:
        return "crashed"
    finally:
        child.kill()
        child.join()


_fork = multiprocessing.get_context("fork")


def _answer(writer: Any, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    log = os.open(f"{work.__name__}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    writer.send(work(*arguments))


def _file(test: str) -> str:
    return test.partition("::")[0]


def main(*arguments: str) -> None:
    """Take the mutants from stdin, the results' file, and what pytest takes."""
    results, *rest = arguments
    mutants, options = json.load(sys.stdin), [*_OPTIONS, *rest]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    trampoline.__name__ = "gcx.trampoline"  # its frames are for warnings to pass over
    trampoline.record_trampoline_hit = _record
    set_mutant_under_test("stats")
    warnings.simplefilter("ignore")
    if any("jax" in option for option in rest if option.startswith("--backends")):
        for name in _FRAMEWORKS:
            import_module(name)
        run(mutants, Collecting(options), Path(results))
    else:
        loop = Loop(lambda session: run(mutants, Collected(session), Path(results)))
        pytest.main(options, plugins=[loop])


if __name__ == "__main__":
    main(*sys.argv[1:])
