"""The commands that compute a report of plain data, and print it as text or as JSON."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.command.requirements import CannotRunError, check_writable, require
from benchmarks.throughput.models import DTYPES, MODELS
from gcx.backends import LIBRARIES

__all__ = ["agreement", "demo", "fuzz", "gpu", "throughput"]

_EXIT_CODES = """\
exit codes:
  0    all is well
  1    a number or a bit is wrong, the frameworks disagree, a limit of `gpu` was missed; or a
       library is installed, but does not load, or fails
  2    nothing was done: a wrong argument, a package that is missing, or no GPU where one is
       asked for (the message says which)
  130  interrupted"""

_RESULTS = Path(__file__).parents[1] / "results"

# What `--json` without the name of a file stands for.
_PRINTED = "-"

# A report is a dataclass of plain values with a field `ok`; a renderer makes text of it.
_Outcome = tuple[Any, Callable[[Any], str]]


def demo(arguments: Sequence[str]) -> int:
    """Train two small networks on scanned digits, with GC and without.

    In every framework that is installed, from the same weights and batches. Shows the accuracy, how
    far the frameworks agree, and that GC keeps the mean weight of each output unit; saves a picture
    of it.
    """
    parser = _parser("demo", demo.__doc__)
    parser.add_argument(
        "--plot", default="gcx-demo.png", metavar="FILE", help="picture (default gcx-demo.png)"
    )
    parser.add_argument(
        "--seeds", type=_positive, default=5, metavar="N", help="trainings of each (default 5)"
    )

    def run(options: Namespace) -> _Outcome:
        require("numpy", "sklearn", "matplotlib", install="pip install --group demo")
        from benchmarks.demo.report import render
        from benchmarks.demo.run import run

        return run(options.plot, options.seeds), render

    return _reported(parser, arguments, run)


def agreement(arguments: Sequence[str]) -> int:
    """Compare every library with exactly rounded sums, and with each other.

    Centralizes random gradients of many shapes, layouts and dtypes in every library and on every
    device. With --bits: compares what reproducible=True gives, which has to be the same in every
    bit.
    """
    parser = _parser("agreement", agreement.__doc__)
    parser.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="of the random gradients (default 0)"
    )
    parser.add_argument(
        "--bits", action="store_true", help="instead: whether reproducible=True gives equal bits"
    )

    def run(options: Namespace) -> _Outcome:
        require("numpy", install='pip install "gcx[numpy]"')
        if options.bits:
            from benchmarks.agreement import bits

            return bits.run(options.seed), bits.render
        from benchmarks.agreement import numbers

        return numbers.run(options.seed), numbers.render

    return _reported(parser, arguments, run)


def fuzz(arguments: Sequence[str]) -> int:
    """Call gcx with random gradients, layouts, strides and options, wrong ones too.

    In every library and dtype, against exactly rounded sums. A trial that failed is printed with
    its number N: --first N --trials 1 repeats it.
    """
    parser = _parser("fuzz", fuzz.__doc__)
    for option, kind, default, what in (
        ("trials", _positive, 20_000, "number of calls"),
        ("seed", _count, 0, "of all calls"),
        ("first", _count, 0, "number of the first call"),
    ):
        text = f"{what} (default {default})"
        parser.add_argument(f"--{option}", type=kind, default=default, metavar="N", help=text)

    def run(options: Namespace) -> _Outcome:
        require("numpy", install='pip install "gcx[numpy]"')
        from benchmarks.fuzz.run import render, run

        return run(options.seed, options.trials, first=options.first), render

    return _reported(parser, arguments, run)


def throughput(arguments: Sequence[str]) -> int:
    """Time gcx on random gradients of the shapes of real models.

    In every library and on every device: beside a copy, the obvious expression and other packages.
    """
    parser = _parser("throughput", throughput.__doc__)
    parser.add_argument("--gpu", action="store_true", help="leave the CPU out")
    for option, names in (("models", MODELS), ("dtypes", DTYPES), ("libraries", LIBRARIES)):
        kind, text = _among(names), f"of {', '.join(names)}"
        parser.add_argument(f"--{option}", type=kind, metavar="A,B", help=text)
    parser.add_argument("--plot", metavar="FILE", help="save a bar chart")

    def run(options: Namespace) -> _Outcome:
        if options.plot:
            require("matplotlib", install="pip install matplotlib")
        from benchmarks.throughput.report import render
        from benchmarks.throughput.run import run

        report = run(
            command=options.line,
            models=options.models,
            dtypes=options.dtypes or DTYPES,
            libraries=options.libraries or LIBRARIES,
            gpu_only=options.gpu,
            plot=options.plot,
        )
        return report, render

    return _reported(parser, arguments, run)


def gpu(arguments: Sequence[str]) -> int:
    """Measure all that gcx promises on a CUDA device, and list the misses.

    With --check: all of it, in up to eight minutes; the report is written to benchmarks/results/.
    Without: less of everything.
    """
    parser = _parser("gpu", gpu.__doc__)
    parser.add_argument("--check", action="store_true", help="all of it, and keep the report")

    def run(options: Namespace) -> _Outcome:
        require("numpy", "torch", install='pip install "gcx[numpy,torch]"')
        from benchmarks.gpu.acceptance import name_file, run
        from benchmarks.gpu.report import render

        report = run(command=options.line, is_brief=not options.check)
        if options.check and options.json is None:
            options.json = str(_RESULTS / name_file(report))
        return report, render

    return _reported(parser, arguments, run)


def _parser(name: str, description: str | None) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description="\n".join(line.strip() for line in (description or "").splitlines()),
        epilog=_EXIT_CODES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=_PRINTED,
        metavar="FILE",
        help="print one JSON object, no text; or write it to a file beside the text",
    )
    return parser


def _reported(
    parser: ArgumentParser, arguments: Sequence[str], run: Callable[[Namespace], _Outcome]
) -> int:
    """Run a command, print its report or write it, and return the exit code."""
    options = parser.parse_args(arguments)
    options.line = " ".join([parser.prog, *arguments])
    try:
        if options.json not in (None, _PRINTED):
            check_writable("--json", options.json, ["json"])
        report, render = run(options)
    except CannotRunError as error:
        if options.json == _PRINTED:
            print(json.dumps({"ok": False, "error": str(error)}))
        raise
    as_json = json.dumps(asdict(report), indent=2)
    print(as_json if options.json == _PRINTED else render(report))
    if options.json not in (None, _PRINTED):
        Path(options.json).write_text(f"{as_json}\n", encoding="utf-8")
    return 0 if report.ok else 1


def _among(names: Collection[str]) -> Callable[[str], list[str]]:
    """Give the type of an argument that is a list of some of `names`."""

    def parsed(text: str) -> list[str]:
        chosen = list(dict.fromkeys(text.split(",")))
        for name in chosen:
            if name not in names:
                raise ArgumentTypeError(f"there is no {name!r}, but {', '.join(names)}")
        return chosen

    return parsed


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not _count(text):
        raise ArgumentTypeError("must be at least 1")
    return int(text)
