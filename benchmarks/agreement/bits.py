"""The bits of every library with reproducible=True, compared with the canonical order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

import gcx
from benchmarks.agreement.canonical import DTYPES, centralized
from benchmarks.agreement.compare import mismatch
from benchmarks.agreement.formats import FORMATS, Format
from benchmarks.agreement.gradients import CASES_WITH_FAN_IN, Case, samples
from benchmarks.agreement.targets import Subject, Target, missing_dtypes, refusals, targets_of
from benchmarks.command.libraries import (
    LeftOut,
    double_precision,
    left_out_lines,
    unusable,
)
from benchmarks.command.progress import track
from gcx.__main__ import LibraryInfo, look_up
from gcx.backends import LIBRARIES
from gcx.plan import aligned

__all__ = [
    "NEVER_PROMISED",
    "BitsReport",
    "BitsRow",
    "not_promised",
    "render",
    "reproducible_targets",
    "run",
]


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


_FORMATS = tuple(kind for kind in FORMATS if kind.name in DTYPES)


@dataclass(frozen=True)
class BitsRow:
    """How many gradients came out of a backend with other bits, in one dtype."""

    ok: bool
    backend: str
    device: str
    dtype: str
    gradients: int
    differing: int
    at: str  # the first of them; empty if there is none


@dataclass(frozen=True)
class BitsReport:
    """All that was compared, and all that was not."""

    ok: bool
    seed: int
    rows: tuple[BitsRow, ...]
    left_out: tuple[LeftOut, ...]


def run(
    seed: int = 0,
    *,
    names: Sequence[str] = LIBRARIES,
    cases: Sequence[Case] = CASES_WITH_FAN_IN,
) -> BitsReport:
    """Check every library that is installed here, on all of its devices.

    Parameters
    ----------
    seed : int, optional
        Of the random gradients.
    names : sequence of str, optional
        Libraries to look for.
    cases : sequence of Case, optional
        Gradients to draw, with a fan-in each.
    """
    libraries = [look_up(name) for name in names]
    usable = [library for library in libraries if library.state == "ok"]
    targets = [target for library in usable for target in reproducible_targets(library)]
    subjects = list(product(targets, _FORMATS))
    with double_precision([library.name for library in usable]):
        missing = missing_dtypes(subjects)
        refused = not_promised([subject for subject in subjects if subject not in missing])
        promised = [subject for subject in subjects if subject not in {**missing, **refused}]
        rows = _compare_all(promised, cases, seed)
    left_out = (*unusable(libraries), *missing.values(), *refused.values(), *NEVER_PROMISED)
    ok = all(row.ok for row in rows) and all(item.ok for item in left_out)
    return BitsReport(ok, seed, rows, left_out)


def render(report: BitsReport) -> str:
    """Write the report as text."""
    header = ("dtype", "backend", "device", "gradients", "other bits", "verdict")
    failed = sum(not row.ok for row in report.rows) + sum(not i.ok for i in report.left_out)
    verdict = "all bits are equal" if report.ok else f"{failed} FAILED"
    return "\n".join(
        [
            "Random gradients of several strides, centralized with reproducible=True, and compared",
            "to the last bit with the canonical order of summation, written in NumPy.",
            "",
            *aligned([header, *map(_cells, report.rows)]),
            "",
            *left_out_lines(report.left_out),
            f"{len(report.rows)} rows, seed {report.seed}: {verdict}",
        ]
    )


def _cells(row: BitsRow) -> tuple[str, ...]:
    verdict = "ok" if row.ok else f"FAILED on {row.at}"
    return row.dtype, row.backend, row.device, str(row.gradients), str(row.differing), verdict


def _compare_all(
    subjects: Sequence[Subject], cases: Sequence[Case], seed: int
) -> tuple[BitsRow, ...]:
    rng = np.random.default_rng(seed)
    found: dict[Subject, list[str]] = {subject: [] for subject in subjects}
    # NumPy warns of the infinities among the numbers.
    with np.errstate(invalid="ignore"):
        for kind, case in track(list(product(_FORMATS, cases)), "checking"):
            for sample in samples(rng, case, kind):
                expected = centralized(sample.values, case.fan_in, kind)
                for target in [target for target, its_kind in subjects if its_kind == kind]:
                    found[target, kind] += [mismatch(target, sample, case, kind, expected)]
    return tuple(_row(*subject, mismatches) for subject, mismatches in found.items())


def _row(target: Target, kind: Format, mismatches: Sequence[str]) -> BitsRow:
    differing = [text for text in mismatches if text]
    return BitsRow(
        ok=not differing,
        backend=target.backend,
        device=target.device,
        dtype=kind.name,
        gradients=len(mismatches),
        differing=len(differing),
        at=differing[0] if differing else "",
    )
