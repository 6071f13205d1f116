"""The options of the command that are about CIFAR-100."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

__all__ = ["DEFAULTS", "STAND_INS", "add_arguments", "at_least"]

# Of options that are None where they are not given, so that it can be told.
DEFAULTS = {"epochs": 200, "layers": "conv", "device": "cuda"}
# Data that ships in packages, and takes the place of the archive.
STAND_INS = ("MNIST", "Indian Pines")


def at_least(least: int) -> Callable[[str], int]:
    """Make a function that reads a number that is not less."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return read


def add_arguments(parser: ArgumentParser) -> None:
    """Add them, in a group of their own; torch is not imported."""
    group = parser.add_argument_group("CIFAR-100 with ResNet-50, on a GPU")
    group.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="folder of cifar-100-python.tar.gz, or unpacked; "
        f"or, to try this on other images, {' or '.join(map(repr, STAND_INS))}",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print the grid and its estimated time, and stop"
    )
    group.add_argument(
        "--epochs", metavar="N", type=at_least(1), help=f"of a run (default: {DEFAULTS['epochs']})"
    )
    group.add_argument(
        "--layers",
        choices=("conv", "all"),
        help="what is centralized (default: convolutions, as in the authors' code)",
    )
    group.add_argument("--device", help=f"of torch (default: {DEFAULTS['device']})")
