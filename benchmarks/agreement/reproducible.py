"""What `check --bits` puts to the test, and what may refuse to be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

import gcx
from benchmarks.agreement.formats import Format
from benchmarks.agreement.gradients import Case
from benchmarks.agreement.refusals import Subject, refusals
from benchmarks.agreement.targets import Target, targets_of
from benchmarks.command.left_out import LeftOut
from benchmarks.command.libraries import LibraryInfo

__all__ = ["NEVER_PROMISED", "not_promised", "reproducible_targets"]


def reproducible_targets(library: LibraryInfo) -> list[Target]:
    """Each device of a library; and inside `jax.jit`, where JAX makes other programs."""
    targets = [replace(target, centralize=_centralize) for target in targets_of(library)]
    if library.name != "jax":
        return targets
    from jax import jit

    compiled = jit(_centralize, static_argnums=1)
    inside = [replace(target, backend="jax.jit", centralize=compiled) for target in targets]
    return [*targets, *inside]


def _centralize(grad: Any, case: Case) -> Any:
    return gcx.centralize(grad, layout=case.layout, reproducible=True)


# Excepted on every machine, as docs/reproducible.md says.
NEVER_PROMISED = (
    LeftOut(True, "complex and float8 dtypes", "not promised, raise a TypeError"),
    LeftOut(True, "other array libraries", "not promised, raise a TypeError"),
    LeftOut(True, "subnormal numbers in jax", "not promised, XLA takes them for zeros on a CPU"),
)


def not_promised(subjects: Iterable[Subject]) -> dict[Subject, LeftOut]:
    """Find what libraries refuse; on a CPU none may that has a backend of its own."""
    return refusals(subjects, _try_one, _may_refuse)


def _try_one(target: Target, kind: Format) -> object:
    case = Case((2, 2), "o...", (1,))
    return target.centralize(target.make(np.ones(case.shape), kind), case)


def _may_refuse(target: Target, _: Format) -> bool:
    return "cpu" not in target.device.lower()
