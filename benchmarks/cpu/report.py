"""The CPU benchmark: ``python -m benchmarks cpu`` prints its tables as Markdown."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.throughput.timing import machine, use_one_core

if TYPE_CHECKING:
    from benchmarks.cpu.accuracy import Accuracy
    from benchmarks.cpu.reproducible import Cost
    from benchmarks.cpu.speed import Speed
    from benchmarks.cpu.training_step import TrainingStep

_PACKAGES = {"numpy": ["numpy"], "torch": ["torch", "pytorch_optimizer"], "jax": ["jax", "optax"]}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=__doc__)
    parser.add_argument("--brief", action="store_true", help="the smallest arrays alone")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the tables there too")
    parser.add_argument(
        "--libraries", default="numpy,torch,jax", help="separated by commas (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    libraries = options.libraries.split(",")

    use_one_core()  # before anything imports NumPy
    lines = []
    for line in report(libraries, brief=options.brief):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        options.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written to {options.write}", file=sys.stderr)
    return 0


def report(libraries: Iterable[str], *, brief: bool) -> Iterator[str]:
    """Lines of the whole report."""
    from benchmarks.cpu.accuracy import accuracies
    from benchmarks.cpu.overhead import (
        dispatch_nanoseconds,
        import_milliseconds,
        unchanged_nanoseconds,
    )
    from benchmarks.cpu.reproducible import costs
    from benchmarks.cpu.speed import speeds

    libraries = list(libraries)
    packages = [p for library in libraries for p in _PACKAGES[library]]
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    today = datetime.now(UTC).date().isoformat()
    yield f"Taken on {today}: {machine()}, one core, one thread."
    yield f"Python {platform.python_version()}, {versions}, float32."
    yield ""
    yield "### Before the arithmetic"
    yield ""
    yield f"* `import gcx`: {import_milliseconds():.1f} ms"
    yield f"* from an array to its backend: {dispatch_nanoseconds():.0f} ns"
    yield f"* a whole call on a bias, which passes through: {unchanged_nanoseconds():.0f} ns"
    for library in libraries:
        yield ""
        yield f"### {library}"
        yield ""
        yield from _speed_table(speeds(library, brief=brief))
        if not brief:
            yield ""
            yield from _accuracy_table(accuracies(library))
    if "torch" in libraries:
        from benchmarks.cpu.training_step import training_steps

        yield ""
        yield "### A training step of torch"
        yield ""
        yield from _training_table(training_steps(brief=brief))
    yield ""
    yield "### The cost of equal bits"
    yield ""
    yield from _cost_table(cost for library in libraries for cost in costs(library, brief=brief))


def _speed_table(rows: Iterable[Speed]) -> Iterator[str]:
    yield "Time of gcx over time of the other; below 1 gcx is faster."
    yield ""
    yield "| call | array | fan-in axis | gcx | over the expression | over the peer |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        peers = [f"{row.ratio(name):.2f} ({name})" for name in row.others if name != "expression"]
        yield (
            f"| {row.what} | {row.size} {row.shape[0]}x{row.shape[1]} | {row.fan_in} "
            f"| {1e6 * row.gcx:.1f} us | {row.ratio('expression'):.2f} "
            f"| {', '.join(peers) or '-'} |"
        )


def _accuracy_table(rows: Iterable[Accuracy]) -> Iterator[str]:
    yield "Largest error against float64, in ulp of the largest magnitude of the output unit."
    yield ""
    yield "| fan-in | axis | values | gcx | the expression |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.fan_in:,} | {row.axis} | {row.rows} | {row.gcx:.2f} | {row.expression:.2f} |"
        )


def _training_table(rows: Iterable[TrainingStep]) -> Iterator[str]:
    yield "Batches of 32. Added is what `optimizer.step()` takes longer, beside the whole step."
    yield "Over none: the whole step over that without centralization; below 1 it is faster."
    yield "Over the loop: added time over what the loop adds; below 1 gcx adds less."
    yield ""
    yield "| model | optimizer | centralization | whole step | over none | added | over the loop |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        for name, seconds in row.whole.items():
            added = row.added(name)
            yield (
                f"| {row.model} | {row.optimizer} | {name} | {1e3 * seconds:.1f} ms "
                f"| {row.ratio(name):.3f} | {1e6 * added:.0f} us ({added / seconds:.2%}) "
                f"| {row.added_over_loop(name):.2f} |"
            )


def _cost_table(rows: Iterable[Cost]) -> Iterator[str]:
    yield (
        "Time of `reproducible=True`, and that over the time of gcx without it; below 1 the "
        "reproducible call is faster."
    )
    yield ""
    yield "| library | call | array | fan-in axis | reproducible | over the default |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.library} | {row.what} | {row.size} {row.shape[0]}x{row.shape[1]} "
            f"| {row.fan_in} | {1e6 * row.reproducible:.1f} us "
            f"| {row.reproducible / row.default:.2f} |"
        )
