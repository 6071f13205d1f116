"""The table of a campaign, and the list of survivors, with a word for each."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from operator import add
from pathlib import Path

import gcx
from benchmarks.mutants.make import Mutant
from benchmarks.throughput.timing import machine

__all__ = ["survivors", "table"]

Made = Mapping[str, Sequence[Mutant]]  # by module
Killers = Mapping[Mutant, str | None]

_WORDS = Path(__file__).with_name("words.txt")
_PACKAGES = ("mutmut", "torch", "jax", "numpy")


def table(made: Made, killers: Killers) -> Iterator[str]:
    """Write one row a module of which mutants were tried, and the sum."""
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    today = datetime.now(UTC).date().isoformat()
    yield f"Taken on {today} of gcx {gcx.__version__}: {machine()}, one core."
    yield f"Python {platform.python_version()}, {versions}."
    yield ""
    yield "| module | mutants | tried, drawn at random | killed | of those tried |"
    yield "|---|---:|---:|---:|---:|"
    sums = [0, 0, 0]
    for module, mutants in made.items():
        found = [killers[mutant] is not None for mutant in mutants if mutant in killers]
        if found:
            counts = len(mutants), len(found), sum(found)
            sums = [*map(add, sums, counts)]
            yield _row(f"`{module}`", *counts)
    yield _row("all", *sums)


def _row(name: str, made: int, tried: int, killed: int) -> str:
    return f"| {name} | {made:,} | {tried:,} | {killed:,} | {killed / max(tried, 1):.1%} |"


def survivors(made: Made, killers: Killers) -> Iterator[str]:
    """Write each survivor as a difference, below the words for its kind."""
    classes, words = _read_words()
    yield from (f"{word}: {meaning}" for word, meaning in classes.items())
    for mutants in made.values():
        for mutant in mutants:
            if killers.get(mutant, "") is None:
                word = words.get(f"{_function(mutant)}: {mutant.after}", "open")
                yield from ("", f"{_function(mutant)}  ({word})", f"- {mutant.before}")
                yield f"+ {mutant.after}"


def _function(mutant: Mutant) -> str:
    """Return the name of the function that the mutant changes, as people write it."""
    name = mutant.name.partition("__mutmut_")[0].removeprefix("gcx.")
    return name.replace(".x_", ".").replace(".xǁ", ".").replace("ǁ", ".")


def _read_words() -> tuple[dict[str, str], dict[str, str]]:
    """Read the meaning of each word, and the word of each change."""
    classes, words, word = {}, {}, ""
    for line in _WORDS.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            word, _, meaning = line[2:].partition(": ")
            classes[word] = meaning
        elif line:
            words[line] = word
    return classes, words
