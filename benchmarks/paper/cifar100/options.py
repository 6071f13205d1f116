"""The options of the command that are about CIFAR-100."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

__all__ = ["add_arguments", "positive"]


def positive(text: str) -> int:
    """Read a number that is 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        msg = f"{text!r} is not a whole number of 1 or more"
        raise ArgumentTypeError(msg)
    return int(text)


def add_arguments(parser: ArgumentParser) -> None:
    """Add them, in a group of their own; torch is not imported."""
    group = parser.add_argument_group("CIFAR-100 with ResNet-50, on a GPU")
    group.add_argument(
        "--data", metavar="DIR", type=Path, help="folder of cifar-100-python.tar.gz, or unpacked"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print the grid and its estimated time, and stop"
    )
    group.add_argument(
        "--epochs", metavar="N", type=positive, default=200, help="of a run (default: %(default)s)"
    )
    group.add_argument(
        "--layers",
        choices=("conv", "all"),
        default="conv",
        help="what is centralized (default: convolutions, as in the authors' code)",
    )
    group.add_argument("--device", default="cuda", help="of torch (default: %(default)s)")
