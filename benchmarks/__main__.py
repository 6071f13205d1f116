"""``python -m benchmarks COMMAND`` runs a program around gcx."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from gcx.__main__ import exit_after

__all__ = ["COMMANDS", "main"]


class Command(NamedTuple):
    """A function that takes the arguments after the name, and returns the exit code."""

    summary: str
    module: str
    function: str = "main"


_REPORTS = "benchmarks.command.reports"
COMMANDS = {
    "demo": Command("train on digits in every framework, with GC and without", _REPORTS, "demo"),
    "agreement": Command("compare the numbers of all libraries, or bits", _REPORTS, "agreement"),
    "fuzz": Command("call gcx with random arguments, right and wrong", _REPORTS, "fuzz"),
    "mutants": Command("change gcx, and see if a test fails", "benchmarks.mutants.run"),
    "throughput": Command("time gcx on the gradients of real models", _REPORTS, "throughput"),
    "gpu": Command("measure on a CUDA device all that gcx promises there", _REPORTS, "gpu"),
    "cpu": Command("time gcx on one core, and measure its errors", "benchmarks.cpu.report"),
    "jax-axes": Command("train JAX layers, and see their means", "benchmarks.cpu.jax_axes"),
    "jax-step": Command("time jitted train steps with GC and without", "benchmarks.cpu.jax_step"),
    "keras-axes": Command("train Keras layers, and see their means", "benchmarks.cpu.keras_axes"),
    "coverage": Command(
        "plan models in use, and count what is unknown", "benchmarks.coverage.report"
    ),
    "paper": Command("train as in the paper, and write its tables", "benchmarks.paper.command"),
    "figures": Command("count lines, functions, imports and frames", "benchmarks.figures"),
}

_EXAMPLES = """\
examples:
  python -m benchmarks demo --plot out.png        what GC does to real training, in a minute
  python -m benchmarks agreement                  compare every library with exact sums
  python -m benchmarks agreement --bits           compare the bits of reproducible=True
  python -m benchmarks throughput --plot out.png  how fast gcx is on real gradients
  python -m benchmarks throughput --help          the options of one command"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    # Imported here, where Ctrl-C is expected.
    from argparse import ArgumentParser, RawDescriptionHelpFormatter

    from benchmarks.command.requirements import CannotRunError

    arguments = sys.argv[1:] if arguments is None else arguments
    width = max(map(len, COMMANDS))
    commands = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    parser = ArgumentParser(
        prog="python -m benchmarks",
        usage="python -m benchmarks [-h] COMMAND ...",
        description="Programs around gcx, which run in a clone of its repository.",
        epilog="\n".join(["commands:", *commands, "", _EXAMPLES]),
        formatter_class=RawDescriptionHelpFormatter,
    )
    if not arguments:
        parser.print_help()
        return 0
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    name = parser.parse_args(arguments[:1]).command
    module, function = COMMANDS[name][1:]
    try:
        code: int = getattr(import_module(module), function)(arguments[1:])
    except CannotRunError as error:
        print(f"{parser.prog} {name}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    exit_after(main)
