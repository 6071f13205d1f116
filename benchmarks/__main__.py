"""The command line: ``python -m benchmarks info | check | bench | demo``."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.command.paths import check_writable
from benchmarks.command.requirements import CannotRunError, require
from benchmarks.throughput.models import DTYPES, MODELS
from gcx.backends import LIBRARIES

__all__ = ["main"]

_DESCRIPTION = """\
Gradient Centralization (GC) subtracts from the gradient of each weight its mean over the inputs of
an output unit, before the optimizer uses it. gcx does that for NumPy, CuPy, PyTorch and JAX."""

_EXAMPLES = """\
examples:
  python -m benchmarks info  what is installed, and on which devices it runs
  python -m benchmarks check  whether all of it computes the right numbers, in seconds
  python -m benchmarks check --bits          whether all of it computes the same bits, if asked to
  python -m benchmarks bench --plot out.png  how fast it is on real gradients, in a minute
  python -m benchmarks demo --plot out.png   what GC does to real training, in a minute

"""

_EXIT_CODES = """\
exit codes:
  0    all is well
  1    check: something is wrong by more than rounding, or bits differ; demo: the frameworks
       disagree; bench gpu --check: a limit was missed; any command: a library is installed, but
       does not load, or fails
  2    nothing was done: a wrong argument, a package that is missing, or no GPU where one is
       asked for (the message says which)
  130  interrupted"""

_INFO = """\
Show the array libraries found here, their versions and devices, and how gcx handles each."""

_CHECK = """\
Centralize random gradients of many shapes, layouts and dtypes in every library and on every device,
and compare the results with exactly rounded sums and with each other. With --bits: compare what
reproducible=True gives, which has to be the same in every bit."""

_BENCH = """\
Centralize random gradients of the shapes of real models, in every library and on every device.
Shows the speed, beside that of a copy, of the obvious expression and of other packages. Only GPUs
with `bench gpu`; `bench gpu --check` measures there whatever gcx promises of GPUs, says what is
missed, and takes minutes."""

_DEMO = """\
Train two small networks on scanned digits, with GC and without, in every framework that is
installed, from the same weights and batches. Shows the accuracy, how far the frameworks agree, and
that GC keeps the mean weight of each output unit; saves a picture of it."""

# What `--json` without the name of a file stands for.
_PRINTED = "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    options.line = " ".join(["python -m benchmarks", *arguments])
    if options.run is None:
        parser.print_help()
        return 0
    try:
        if options.json not in (None, _PRINTED):
            check_writable("--json", options.json, ["json"])
        report, render = options.run(options)
    except CannotRunError as error:
        print(f"gcx {options.command}: {error}", file=sys.stderr)
        if options.json == _PRINTED:
            print(json.dumps({"ok": False, "error": str(error)}))
        return 2
    except KeyboardInterrupt:
        return 130
    as_json = json.dumps(asdict(report), indent=2)
    print(as_json if options.json == _PRINTED else render(report))
    if options.json not in (None, _PRINTED):
        Path(options.json).write_text(f"{as_json}\n", encoding="utf-8")
    return 0 if report.ok else 1


# A report is a dataclass of plain values with a field `ok`; a renderer makes text of it.
_Outcome = tuple[Any, Callable[[Any], str]]


def _info(_: Namespace) -> _Outcome:
    from benchmarks.command.info import collect, render

    return collect(), render


def _check(options: Namespace) -> _Outcome:
    require("numpy", install='pip install "gcx[numpy]"')
    if options.bits:
        from benchmarks.agreement import bits

        return bits.run(options.seed), bits.render
    from benchmarks.agreement.report import render
    from benchmarks.agreement.run import run

    return run(options.seed), render


def _bench(options: Namespace) -> _Outcome:
    if options.check:
        return _bench_check(options)
    if options.brief:
        msg = "--brief goes with --check; for less of the rest, say what with --models"
        raise CannotRunError(msg)
    if options.plot:
        require("matplotlib", install="pip install matplotlib")
    from benchmarks.throughput.report import render
    from benchmarks.throughput.run import run

    report = run(
        command=options.line,
        models=options.models,
        dtypes=options.dtypes or DTYPES,
        libraries=options.libraries or LIBRARIES,
        gpu_only=options.where == "gpu",
        plot=options.plot,
    )
    return report, render


def _bench_check(options: Namespace) -> _Outcome:
    if options.where != "gpu":
        msg = "--check is of GPUs: python -m benchmarks bench gpu --check"
        raise CannotRunError(msg)
    if options.plot or options.models or options.dtypes or options.libraries:
        msg = "--check has a list of its own: leave out --models, --dtypes, --libraries and --plot"
        raise CannotRunError(msg)
    require("numpy", "torch", install='pip install "gcx[numpy,torch]"')
    from benchmarks.gpu.acceptance import run
    from benchmarks.gpu.report import render

    return run(command=options.line, is_brief=options.brief), render


def _demo(options: Namespace) -> _Outcome:
    require("numpy", "sklearn", "matplotlib", install='pip install "gcx[demo]"')
    from benchmarks.demo.report import render
    from benchmarks.demo.run import run

    return run(options.plot, options.seeds), render


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        epilog=_EXAMPLES + _EXIT_CODES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    def add(
        name: str, summary: str, description: str, run: Callable[[Namespace], _Outcome]
    ) -> ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=_EXIT_CODES,
            formatter_class=RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "--json",
            nargs="?",
            const=_PRINTED,
            metavar="FILE",
            help="print one JSON object, no text; or write it to a file beside the text",
        )
        return command

    add("info", "what is installed, and how it is handled", _INFO, _info)
    check = add("check", "whether every library gives the right numbers", _CHECK, _check)
    check.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="of the random gradients (default 0)"
    )
    check.add_argument(
        "--bits", action="store_true", help="instead: whether reproducible=True gives equal bits"
    )
    bench = add("bench", "how fast it is on the gradients of real models", _BENCH, _bench)
    bench.add_argument("where", nargs="?", choices=["gpu"], help="leave the CPU out")
    bench.add_argument(
        "--models", type=_among(MODELS), metavar="A,B", help=f"of {', '.join(MODELS)}"
    )
    bench.add_argument(
        "--dtypes", type=_among(DTYPES), metavar="A,B", help=f"of {', '.join(DTYPES)}"
    )
    bench.add_argument(
        "--libraries", type=_among(LIBRARIES), metavar="A,B", help=f"of {', '.join(LIBRARIES)}"
    )
    bench.add_argument("--plot", metavar="FILE", help="save a bar chart")
    bench.add_argument("--check", action="store_true", help="with gpu: what gcx promises of GPUs")
    bench.add_argument("--brief", action="store_true", help="with --check: less of everything")
    demo = add("demo", "training on digits, with and without GC", _DEMO, _demo)
    demo.add_argument(
        "--plot", default="gcx-demo.png", metavar="FILE", help="picture (default gcx-demo.png)"
    )
    demo.add_argument(
        "--seeds", type=_positive, default=5, metavar="N", help="trainings of each (default 5)"
    )
    return parser


def _among(names: Collection[str]) -> Callable[[str], list[str]]:
    """Give the type of an argument that is a list of some of `names`."""

    def parsed(text: str) -> list[str]:
        chosen = list(dict.fromkeys(text.split(",")))
        for name in chosen:
            if name not in names:
                msg = f"there is no {name!r}, but {', '.join(names)}"
                raise ArgumentTypeError(msg)
        return chosen

    return parsed


def _count(text: str) -> int:
    if not text.isdecimal():
        msg = f"{text!r} is not a whole number from 0 on"
        raise ArgumentTypeError(msg)
    return int(text)


def _positive(text: str) -> int:
    if not _count(text):
        msg = "must be at least 1"
        raise ArgumentTypeError(msg)
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
