"""What cannot be checked here, as libraries refuse it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from benchmarks.agreement.formats import Format
from benchmarks.agreement.targets import Target
from benchmarks.command.attempt import attempt
from benchmarks.command.left_out import LeftOut

__all__ = ["Subject", "missing_dtypes", "refusals"]

Subject = tuple[Target, Format]

# Dtypes that some library or device has not got; the others are never left out in peace.
_OPTIONAL = ("float64", "bfloat16", "float8_e4m3fn", "complex64")


def missing_dtypes(subjects: Iterable[Subject]) -> dict[Subject, LeftOut]:
    """Dtypes that a target cannot make arrays of, with its own words for it."""

    def make(target: Target, kind: Format) -> object:
        return target.make(np.ones(1, "complex128" if kind.is_complex else "float64"), kind)

    return refusals(subjects, make, lambda _, kind: kind.name in _OPTIONAL)


def refusals(
    subjects: Iterable[Subject],
    ask: Callable[[Target, Format], object],
    may_refuse: Callable[[Target, Format], bool],
) -> dict[Subject, LeftOut]:
    """Put a question to each target in each dtype, and keep what is raised."""
    refused = {}
    for target, kind in subjects:
        _, why = attempt(partial(ask, target, kind))
        if why:
            is_fine = may_refuse(target, kind)
            refused[target, kind] = LeftOut(is_fine, f"{kind.name} in {target}", why)
    return refused
