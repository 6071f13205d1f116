"""Two libraries compared, on outcomes that are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.paper.agreement import EARLY, accuracies, agree, effects, torch_table
from benchmarks.paper.cells import BASE, Outcome

from outcomes import TABLE_2, arms

CELL, OTHER = TABLE_2[0], TABLE_2[-1]
IN_JAX = [o for cell in (CELL, OTHER) for o in arms(cell, {"gradient": 1.0})]


def shifted(outcome: Outcome, by: float, seeds: Any = slice(None)) -> Outcome:
    """Another library: the runs of some seeds, with other noise, and better by so much."""
    noise = np.random.default_rng(len(outcome.arm)).normal(0, 0.3, outcome.accuracy.shape)
    return replace(
        outcome,
        seeds=outcome.seeds[seeds],
        accuracy=(outcome.accuracy + noise + by)[seeds],
        loss=outcome.loss[seeds],
    )


def in_torch(without: float = 0.0, gradient: float = 0.0, seeds: Any = slice(None)) -> list:
    by = {BASE: without, "gradient": gradient}
    return [shifted(outcome, by[outcome.arm], seeds) for outcome in IN_JAX]


def all_agree(torch: list[Outcome]) -> tuple[bool, bool]:
    """On the accuracies, and on the effects."""
    of_arms = [a.comparison.paired for a in accuracies(IN_JAX, torch)]
    return all(agree(of_arms)), all(agree([e.difference for e in effects(IN_JAX, torch)]))


def test_noise_alone_is_no_difference():
    assert all_agree(in_torch()) == (True, True)


def test_a_shift_of_both_arms_is_one_of_accuracies_and_not_of_effects():
    assert all_agree(in_torch(without=2.0, gradient=2.0)) == (False, True)


def test_a_shift_of_one_arm_is_one_of_effects_too():
    assert all_agree(in_torch(gradient=2.0)) == (False, False)


def test_numbers_by_hand():
    base, gradient = (
        replace(o, seeds=(0, 1), accuracy=a, loss=np.ones((2, 20)))
        for o, a in zip(IN_JAX[:2], _column([90, 92], [91, 94]), strict=True)
    )
    late, early = np.ones((2, 20)), np.ones((2, 20))
    late[0, EARLY], early[1, EARLY - 1] = 2, 0.75
    torch = [
        replace(o, accuracy=a, loss=loss)
        for o, a, loss in zip(
            (base, gradient), _column([89, 93], [92, 95]), (late, early), strict=True
        )
    ]
    first, second = accuracies([base, gradient], torch)
    assert (first.comparison.base.mean, first.comparison.other.mean) == (91, 91)
    assert (first.comparison.paired.difference, second.comparison.paired.difference) == (0, 1)
    assert (first.per_seed, second.per_seed) == (1, 1)
    assert (first.early_losses, second.early_losses) == (0, 0.25)
    (effect,) = effects([base, gradient], torch)
    assert effect.jax.paired.difference == 1.5
    assert effect.torch.paired.difference == 2.5
    assert effect.difference.difference == 1


def _column(*accuracies: list[float]) -> list[np.ndarray]:
    return [np.array(values, dtype=float)[:, None] for values in accuracies]


def test_runs_are_paired_by_their_seed():
    few = in_torch(seeds=slice(6, 2, -1))
    assert few[0].seeds == (6, 5, 4, 3)
    for found, expected in zip(accuracies(IN_JAX, few), IN_JAX, strict=True):
        assert found.comparison.seeds == 4
        assert found.comparison.base.mean == pytest.approx(expected.accuracy[3:7, -1].mean())
        assert found.early_losses == 0


def test_what_has_no_pair_is_an_error():
    with pytest.raises(ValueError, match=r"'gradient' of Cell\(.* not among the outcomes in JAX"):
        accuracies(IN_JAX[:1], in_torch())
    fewer = [replace(o, seeds=(0, 1), accuracy=o.accuracy[:2], loss=o.loss[:2]) for o in IN_JAX]
    with pytest.raises(ValueError, match=r"seeds \[2, 3, 4, 5, 6, 7, 8, 9\] were not run"):
        effects(fewer, in_torch())


def test_table():
    text = torch_table(IN_JAX, in_torch(gradient=2.0))
    assert text == torch_table(IN_JAX, in_torch(gradient=2.0))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == (1 + 4) + (1 + 2)
    base, effect = accuracies(IN_JAX, in_torch(gradient=2.0))[0], effects(IN_JAX, in_torch())[0]
    assert f"| {base.comparison.base.mean:.2f} ± {base.comparison.base.sd:.2f} |" in rows[1]
    assert f"| {effect.jax.paired.difference:+.2f} [" in rows[6]
    assert "shown in 2 of 4 accuracies and in 0 of 2 effects" in text
