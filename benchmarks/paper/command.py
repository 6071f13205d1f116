"""Train with Gradient Centralization and without, as in the paper, and compare.

Without --data: small networks on digits, MNIST, Indian Pines and a regression, on all cores of a
CPU; all of this data ships in packages.
With --data: ResNet-50 on CIFAR-100, on a GPU, or on other images to see that it trains there.
What was cut short goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper.cifar100.options import DEFAULTS, STAND_INS, add_arguments, at_least
from benchmarks.paper.files import check_folder

PARTS = (
    *("table1", "table2", "regimes", "places", "rates", "libraries", "energy", "theory"),
    *("tuning", "kinds", "mnist", "indian-pines", "drift"),
)
WITHOUT_SEEDS = {"energy", "theory", "drift"}


SMALL_ALONE = ("only", "brief")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--write",
        metavar="FOLDER",
        type=Path,
        help="for the report, and below it for the runs "
        "(default: paper-results); with --brief the folder brief in it",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=at_least(2), help="in each cell: an interval takes two"
    )
    small = parser.add_argument_group("small data, on a CPU")
    small.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    small.add_argument("--brief", action="store_true", help="hardly train, to see that all runs")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    is_cifar = bool(options.data or options.dry_run)
    _refuse_options(parser, options, SMALL_ALONE if is_cifar else DEFAULTS, is_cifar=is_cifar)
    if options.seeds and options.only and set(options.only) <= WITHOUT_SEEDS:
        parser.error(
            "of no effect on energy, theory and drift, which have their own seeds: --seeds"
        )
    folder = options.write or Path("paper-results")
    if options.brief:
        folder /= "brief"  # so that it never takes the place of a report
        print("A short run, to see that all works: its figures say nothing.", flush=True)
    if str(options.data) in STAND_INS:
        folder /= options.data
    try:
        if not options.dry_run:
            check_folder("--write", folder)
        for path in (_cifar100 if is_cifar else _small_data)(options, folder):
            print(path, flush=True)
    except CannotRunError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _refuse_options(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    names: Iterable[str],
    *,
    is_cifar: bool,
) -> None:
    """Refuse options that would be of no effect."""
    where = (
        "CIFAR-100 (--data, --dry-run)" if is_cifar else "small data, without --data or --dry-run"
    )
    given = [f"--{name}" for name in names if getattr(options, name)]
    if given:
        parser.error(f"of no effect on {where}: {', '.join(given)}")


def _small_data(options: argparse.Namespace, folder: Path) -> Iterator[Path]:
    from benchmarks.paper.small_data import sections

    return sections(options.only or PARTS, folder, seeds=options.seeds, hardly=options.brief)


def _cifar100(options: argparse.Namespace, folder: Path) -> Iterator[Path]:
    from benchmarks.paper.cifar100.driver import run, sections

    chosen: dict[str, Any] = {
        name: getattr(options, name) or default for name, default in DEFAULTS.items()
    }
    write = partial(sections, folder=folder, data=options.data)
    outcomes = run(
        options.data,
        folder / "runs",
        seeds=options.seeds or 5,
        dry_run=options.dry_run,
        after_run=lambda found: [*write(found)],
        **chosen,
    )
    return write(outcomes)
