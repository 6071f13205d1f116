"""The campaign: each trial in one library and dtype, its answer held against exact sums."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from math import inf
from typing import Any, NamedTuple

import numpy as np

import gcx
from benchmarks.agreement.bits import not_promised, reproducible_targets
from benchmarks.agreement.canonical import DTYPES
from benchmarks.agreement.canonical import centralized as centralized_in_order
from benchmarks.agreement.compare import check_kind
from benchmarks.agreement.formats import FORMATS, Format
from benchmarks.agreement.gradients import Case, centralized
from benchmarks.agreement.targets import Subject, Target, missing_dtypes, targets_of
from benchmarks.command.libraries import LeftOut, double_precision, left_out_lines, unusable
from benchmarks.command.progress import track
from benchmarks.fuzz.trials import Gradient, Trial, draw_trial
from gcx.__main__ import look_up
from gcx.backends import LIBRARIES
from gcx.plan import aligned

__all__ = ["FuzzReport", "FuzzRow", "render", "run"]


@dataclass(frozen=True)
class FuzzRow:
    """What became of the trials of one library and dtype."""

    ok: bool
    backend: str
    device: str
    dtype: str
    trials: int
    failed: int
    worst: float  # in ulp, of the trials that passed
    limit: float


@dataclass(frozen=True)
class FuzzReport:
    """All trials, and those that failed."""

    ok: bool
    seed: int
    trials: int
    rows: tuple[FuzzRow, ...]
    failures: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def run(
    seed: int = 0, trials: int = 20_000, *, first: int = 0, names: Sequence[str] = LIBRARIES
) -> FuzzReport:
    """Try every library that is installed here, on all of its devices.

    Parameters
    ----------
    seed : int, optional
        Of all trials.
    trials : int, optional
        Number of calls, over all libraries and dtypes in turn.
    first : int, optional
        Number of the first call: to repeat one.
    names : sequence of str, optional
        Libraries to look for.
    """
    libraries = [look_up(name) for name in names]
    usable = [library for library in libraries if library.state == "ok"]
    targets = [target for library in usable for target in targets_of(library)]
    bits = [target for library in usable for target in reproducible_targets(library)]
    outcomes: dict[Subject, list[float]] = defaultdict(list)
    failed: Counter[Subject] = Counter()
    failures = []
    with double_precision([library.name for library in usable]), np.errstate(all="ignore"):
        subjects = list(product(targets, FORMATS))
        missing = missing_dtypes(subjects)
        subjects = [subject for subject in subjects if subject not in missing]
        # JAX compiles a program for each shape, so it has fewer turns.
        turns = [*subjects, *[s for s in subjects if s[0].backend != "jax"] * 3, *_strict()]
        with_bits = _with_bits(bits)
        for number in track(range(first, first + trials), "trying"):
            target, kind = subject = turns[number % len(turns)]
            has_bits = (target.backend, target.device, kind.name) in with_bits
            can_write = target.backend in _WRITABLE
            trial = draw_trial((seed, number), kind, can_write=can_write, has_bits=has_bits)
            ulp, problem = _judge(target, kind, trial)
            outcomes[subject].append(ulp)
            if problem:
                failed[subject] += 1
                failures.append(f"{target} in {kind.name}, {trial}: {problem}")
    rows = tuple(_row(subject, found, failed[subject]) for subject, found in outcomes.items())
    left_out = (*unusable(libraries), *missing.values())
    ok = not failures and all(item.ok for item in left_out)
    return FuzzReport(ok, seed, trials, rows, tuple(failures), left_out)


def render(report: FuzzReport) -> str:
    """Write the report as text."""
    header = ("dtype", "backend", "device", "trials", "worst", "limit", "verdict")
    lines = [
        "Random calls of gcx.centralize and gcx.centralize_many, against exactly rounded sums; a",
        "tenth of them are wrong on purpose. Worst error and limit in ulp of the largest magnitude",
        "in the output unit.",
        "",
        *aligned([header, *map(_cells, report.rows)]),
        "",
        *left_out_lines(report.left_out),
        *(f"FAILED: {failure}" for failure in report.failures[:20]),
        f"{report.trials} trials, seed {report.seed}: {len(report.failures)} failed",
    ]
    return "\n".join(lines)


def _row(subject: Subject, ulps: Sequence[float], failed: int) -> FuzzRow:
    target, kind = subject
    worst, count = max(ulps), len(ulps)
    about = target.backend, target.device, kind.name
    return FuzzRow(not failed, *about, count, failed, worst, kind.limit)


def _cells(row: FuzzRow) -> tuple[str, ...]:
    verdict = "ok" if row.ok else f"{row.failed} FAILED"
    numbers = str(row.trials), f"{row.worst:.3g}", f"{row.limit:g}"
    return row.dtype, row.backend, row.device, *numbers, verdict


_WRITABLE = {"numpy", "torch", "cupy"}


def _strict() -> list[Subject]:
    """Stand for all libraries without a backend of their own."""
    if find_spec("array_api_strict") is None:
        return []
    import array_api_strict as strict

    def asarray(values: Any, dtype: str) -> Any:
        return strict.asarray(values, dtype=getattr(strict, dtype))

    def centralize(grad: Any, case: Case) -> Any:
        return gcx.centralize(grad, layout=case.layout)

    target = Target("array_api_strict", "cpu", False, asarray, centralize, np.from_dlpack)
    return [(target, kind) for kind in FORMATS if hasattr(strict, kind.name)]


def _with_bits(targets: Sequence[Target]) -> set[tuple[str, str, str]]:
    """List the backends, devices and dtypes for which `reproducible` is promised."""
    subjects = [(t, kind) for t, kind in product(targets, FORMATS) if kind.name in DTYPES]
    missing = missing_dtypes(subjects)
    refused = not_promised([subject for subject in subjects if subject not in missing])
    promised = [subject for subject in subjects if subject not in {**missing, **refused}]
    return {(target.backend, target.device, kind.name) for target, kind in promised}


class _Call(NamedTuple):
    """The arguments of one call, as arrays of one library."""

    grads: list[Any]
    layouts: list[Any]
    outs: list[Any] | None
    options: dict[str, Any]

    def read(self, target: Target) -> list[Any]:
        """Copy all arrays to NumPy."""
        return [np.array(target.to_numpy(array)) for array in [*self.grads, *(self.outs or [])]]

    def run(self, *, is_list: bool) -> list[Any]:
        """Call gcx, and list the results."""
        grads, layouts, outs, options = self
        if is_list:
            return gcx.centralize_many(grads, layouts=layouts, out=outs, **options)
        out = outs[0] if outs else None
        return [gcx.centralize(grads[0], layout=layouts[0], out=out, **options)]


def _judge(target: Target, kind: Format, trial: Trial) -> tuple[float, str]:
    """Run one trial; return the largest error in ulp, and the problem, or no text."""
    call = _prepare(target, kind, trial)
    before = call.read(target)
    results: list[Any] = []
    try:
        results = call.run(is_list=trial.is_list)
        problem = "no error" if trial.fault else ""
    except (TypeError, ValueError) as error:
        problem = "" if trial.fault else f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - any other error is a fault of gcx
        problem = f"{type(error).__name__}: {error}"
    unchanged = None  # all arrays; the gradients come first
    if call.outs and not trial.fault:
        unchanged = len(call.grads) if trial.out == "other" else 0
    if not all(map(_are_equal, before[:unchanged], call.read(target))):
        problem = problem or "an array was changed"
    if problem or trial.fault:
        return 0.0, problem
    worst = 0.0
    for grad, gradient, result, out in zip(
        call.grads, trial.gradients, results, call.outs or call.grads, strict=True
    ):
        returns_itself = call.outs is not None or not gradient.has_mean
        if returns_itself and result is not out:
            return 0.0, "the result is another array than expected"
        check_kind(result, grad)
        ulp = _measure(np.array(target.to_numpy(result)), gradient, kind, trial)
        worst = max(worst, ulp)
    return (worst, "") if worst <= kind.limit else (0.0, f"{worst:.3g} ulp off")


def _prepare(target: Target, kind: Format, trial: Trial) -> _Call:
    def make(values: Any) -> Any:
        return target.make(values.copy(), kind)  # torch would share the memory

    grads = [gradient.lay_out(make) for gradient in trial.gradients]
    layouts: list[Any] = [gradient.layout for gradient in trial.gradients]
    outs = None
    if trial.out != "none":
        others = [make(np.zeros_like(gradient.values)) for gradient in trial.gradients]
        outs = grads if trial.out == "self" else others
    last = trial.gradients[-1].values
    strength = trial.strength
    if trial.fault == "strength":
        strength = 1.5
    elif trial.fault == "integers":
        grads = [*grads[:-1], target.asarray(np.ones((2, 3)), "int32")]
        layouts[-1] = "o..."
    elif trial.fault == "rank":
        layouts[-1] = "i" * (last.ndim + 1)
    elif trial.fault == "shape of out":
        outs = [*(outs or grads)[:-1], make(np.ones(last.size + 1))]
    return _Call(grads, layouts, outs, {"strength": strength, "reproducible": trial.reproducible})


def _are_equal(one: Any, other: Any) -> bool:
    return np.array_equal(one, other, equal_nan=True)


def _measure(result: Any, gradient: Gradient, kind: Format, trial: Trial) -> float:
    """Largest error in ulp of the largest magnitude in the output unit; infinity if far off."""
    values = gradient.values.reshape(gradient.split)
    if not gradient.has_mean or not values.size:
        return 0.0 if _are_equal(result, gradient.values) else inf
    result = result.astype(values.dtype).reshape(gradient.split)
    fan_in = gradient.fan_in
    # One number that is not finite spoils its own output unit, and no other.
    is_spoiled = ~np.all(np.isfinite(values), axis=fan_in, keepdims=True)
    if trial.strength > 0 and np.any(np.isfinite(result) & is_spoiled):
        return inf
    finite = np.where(is_spoiled, 0, values)
    result = np.where(is_spoiled, 0, result)
    if trial.reproducible:
        expected = centralized_in_order(finite, fan_in, kind)
        return 0.0 if np.array_equal(result, expected) else inf
    exact = finite - trial.strength * (finite - centralized(finite, fan_in))
    largest = np.max(np.maximum(np.abs(finite), np.abs(exact)), axis=fan_in, keepdims=True)
    ulp = float(np.max(np.abs(result - exact) / kind.ulp(largest)))
    return ulp / 2 if gradient.is_constant else ulp  # here twice the limit is allowed
