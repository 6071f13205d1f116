"""Whether two libraries agree: on the first losses, on accuracies, on what GC changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.paper.cells import BASE, Cell, Outcome
from benchmarks.paper.labels import in_common, title, varying, written
from benchmarks.paper.markdown import interval, p_value, spread, table, text
from benchmarks.paper.statistics import CONFIDENCE, Comparison, Paired, compare, holm, paired

__all__ = ["EARLY", "Accuracy", "Effect", "accuracies", "agree", "effects", "torch_table"]

# So many losses differ by rounding alone.
EARLY = 10


@dataclass(frozen=True)
class Accuracy:
    """An arm in both libraries.

    Attributes
    ----------
    comparison : Comparison
        Of torch (its `other`) with JAX (its `base`), by seed.
    per_seed : float
        Mean distance of two runs of one seed, in points.
    early_losses : float
        Largest relative difference of the first losses, over the seeds.
    """

    comparison: Comparison
    per_seed: float
    early_losses: float


@dataclass(frozen=True)
class Effect:
    """What an arm changes, in both libraries; `difference` is that of torch less that of JAX."""

    jax: Comparison
    torch: Comparison
    difference: Paired


def accuracies(jax: Iterable[Outcome], torch: Iterable[Outcome]) -> list[Accuracy]:
    """Each outcome of torch and the one in JAX, of which there may be more, and of more seeds.

    Raises
    ------
    ValueError
        Where an outcome of torch, or a seed of it, has none in JAX; and as
        `benchmarks.paper.statistics.compare` does.
    """
    return [_accuracy(in_jax, in_torch) for in_jax, in_torch in _matched(jax, torch)]


def effects(jax: Iterable[Outcome], torch: Iterable[Outcome]) -> list[Effect]:
    """Compare what each arm changes in torch with what it does in JAX.

    Raises
    ------
    ValueError
        As `accuracies` does.
    """
    pairs = {(both[1].cell, both[1].arm): both for both in _matched(jax, torch)}
    return [_effect(pairs[cell, BASE], both) for (cell, arm), both in pairs.items() if arm != BASE]


def agree(differences: Sequence[Paired]) -> list[bool]:
    """Whether no difference is shown, after Holm's correction for all of them."""
    return [p >= 1 - CONFIDENCE for p in holm([difference.p for difference in differences])]


def torch_table(jax: Iterable[Outcome], torch: Iterable[Outcome]) -> str:
    """Write both libraries side by side, in Markdown: accuracies, and what each arm changes.

    Raises
    ------
    ValueError
        As `accuracies` does.
    """
    jax, torch = list(jax), list(torch)
    of_arms, changes = accuracies(jax, torch), effects(jax, torch)
    cells = [accuracy.comparison.cell for accuracy in of_arms]
    names = varying(cells)
    fields = [title(name) for name in names]
    apart = f"torch less JAX [{CONFIDENCE:.0%} interval]"
    accuracy_header = ["GC on", "JAX", "torch", apart, "p (Holm)", "seed by seed", "first losses"]
    effect_header = ["GC on", "JAX", "torch", apart, "p (Holm)"]
    seeds = of_arms[0].comparison.seeds
    return text(
        f"PyTorch and JAX. {in_common(cells)}, {seeds} seeds, the same in both.",
        "",
        "Test accuracy in percent, mean ± sd:",
        "",
        *table([*fields, *accuracy_header], _accuracy_rows(of_arms, names)),
        "",
        "What Gradient Centralization changes, in points:",
        "",
        *table([*fields, *effect_header], _effect_rows(changes, names)),
        "",
        _summary(of_arms, changes),
    )


def _matched(jax: Iterable[Outcome], torch: Iterable[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """With each outcome of torch the first in JAX of its cell and arm, with the same seeds."""
    by_name: dict[tuple[Cell, str], Outcome] = {}
    for outcome in jax:
        by_name.setdefault((outcome.cell, outcome.arm), outcome)
    matched = []
    for outcome in torch:
        if (outcome.cell, outcome.arm) not in by_name:
            raise ValueError(
                f"{outcome.arm!r} of {outcome.cell} is not among the outcomes in JAX; run it"
            )
        found = by_name[outcome.cell, outcome.arm]
        matched.append((_with_seeds(found, outcome.seeds), outcome))
    return matched


def _with_seeds(outcome: Outcome, seeds: tuple[int, ...]) -> Outcome:
    missing = set(seeds) - set(outcome.seeds)
    if missing:
        raise ValueError(
            f"{outcome.arm!r} of {outcome.cell} in JAX: seeds {sorted(missing)} were not run"
        )
    rows = [outcome.seeds.index(seed) for seed in seeds]
    return replace(outcome, seeds=seeds, accuracy=outcome.accuracy[rows], loss=outcome.loss[rows])


def _accuracy(jax: Outcome, torch: Outcome) -> Accuracy:
    return Accuracy(
        comparison=compare(jax, torch),
        per_seed=float(np.abs(_final(torch) - _final(jax)).mean()),
        early_losses=float(np.abs(torch.loss[:, :EARLY] / jax.loss[:, :EARLY] - 1).max()),
    )


def _effect(base: tuple[Outcome, Outcome], other: tuple[Outcome, Outcome]) -> Effect:
    """Of two arms, each in JAX and in torch."""
    in_jax, in_torch = (
        _final(after) - _final(before) for before, after in zip(base, other, strict=True)
    )
    return Effect(
        jax=compare(base[0], other[0]),
        torch=compare(base[1], other[1]),
        difference=paired(in_torch - in_jax),
    )


def _final(outcome: Outcome) -> Any:
    return np.asarray(outcome.accuracy, dtype=np.float64)[:, -1]


def _accuracy_rows(found: Sequence[Accuracy], names: Sequence[str]) -> list[list[str]]:
    adjusted = holm([accuracy.comparison.paired.p for accuracy in found])
    return [
        [
            *(written(name, getattr(a.comparison.cell, name)) for name in names),
            *(a.comparison.arm, spread(a.comparison.base), spread(a.comparison.other)),
            *(interval(a.comparison.paired), p_value(p)),
            *(f"{a.per_seed:.2f}", f"{a.early_losses:.0e}"),
        ]
        for a, p in zip(found, adjusted, strict=True)
    ]


def _effect_rows(found: Sequence[Effect], names: Sequence[str]) -> list[list[str]]:
    adjusted = holm([effect.difference.p for effect in found])
    return [
        [
            *(written(name, getattr(effect.jax.cell, name)) for name in names),
            *(effect.jax.arm, interval(effect.jax.paired), interval(effect.torch.paired)),
            *(interval(effect.difference), p_value(p)),
        ]
        for effect, p in zip(found, adjusted, strict=True)
    ]


def _summary(of_arms: Sequence[Accuracy], changes: Sequence[Effect]) -> str:
    arms = agree([accuracy.comparison.paired for accuracy in of_arms])
    differences = agree([effect.difference for effect in changes])
    return (
        "Seed by seed: mean distance of the accuracies of two runs of one seed, in points; first "
        f"losses: largest relative difference of the first {EARLY}. Intervals and p by Student's "
        "t, of runs paired by their seed. After Holm's correction no difference between the "
        f"libraries is shown in {sum(arms)} of {len(arms)} accuracies and in {sum(differences)} "
        f"of {len(differences)} effects."
    )
