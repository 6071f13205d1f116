"""Train with Gradient Centralization and without, as in the paper, and compare.

Without --data: small residual networks on scikit-learn's digits, on all cores of a CPU.
With --data: ResNet-50 on CIFAR-100, on a GPU.
What was cut short goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.paper.cifar100.options import add_arguments, positive
from gcx._cli.requirements import CannotRunError

PARTS = ("table1", "table2", "regimes", "places", "rates", "libraries", "energy", "theory")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--write",
        metavar="FOLDER",
        type=Path,
        default=Path("paper-results"),
        help="for the report, and below it for the runs (default: %(default)s)",
    )
    parser.add_argument("--seeds", metavar="N", type=positive, help="in each cell")
    digits = parser.add_argument_group("digits, on a CPU")
    digits.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    digits.add_argument("--brief", action="store_true", help="hardly train, to see that all runs")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    sections = _cifar100 if options.data or options.dry_run else _digits
    try:
        for path in sections(options):
            print(path, flush=True)
    except CannotRunError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _digits(options: argparse.Namespace) -> Iterator[Path]:
    from benchmarks.paper.on_digits import sections

    return sections(options.only, options.write, seeds=options.seeds, hardly=options.brief)


def _cifar100(options: argparse.Namespace) -> Iterator[Path]:
    from benchmarks.paper.cifar100.driver import run, sections

    outcomes = run(
        options.data,
        options.write / "runs",
        seeds=options.seeds or 5,
        epochs=options.epochs,
        device=options.device,
        layers=options.layers,
        dry_run=options.dry_run,
    )
    return sections(outcomes, options.write)


if __name__ == "__main__":
    sys.exit(main())
