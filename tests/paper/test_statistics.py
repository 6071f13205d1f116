"""The comparison of two arms, against SciPy and numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.paper.cells import Cell, Outcome
from benchmarks.paper.losses import half_way_loss, running_mean, steps_to
from benchmarks.paper.statistics import (
    Verdict,
    as_family,
    compare,
    compare_all,
    holm,
    paired,
    sign_flip_p,
)

CELL = Cell("digits", "batch norm", "SGDM", 0.1, 5e-4)
LOSS = np.linspace(2.0, 0.1, 20)


def outcome(
    final: Any, arm: str = "without", seeds: Any = None, loss: Any = None, cell: Cell = CELL
) -> Outcome:
    final = np.asarray(final, dtype=np.float64)
    return Outcome(
        cell=cell,
        arm=arm,
        seeds=tuple(range(len(final)) if seeds is None else seeds),
        accuracy=np.stack([final / 2, final], axis=1),
        loss=np.tile(LOSS, (len(final), 1)) if loss is None else np.asarray(loss),
        checkpoints=np.array([10, 20]),
    )


class TestPaired:
    def test_it_is_the_t_test_and_interval_of_scipy(self) -> None:
        before, after = np.random.default_rng(0).normal(90, 2, (2, 12))
        expected = stats.ttest_rel(after, before)
        interval = expected.confidence_interval(0.95)
        found = paired(after - before)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)

    def test_by_hand(self) -> None:
        found = paired([1.0, 2.0, 3.0])  # sd 1; t(0.975, 2) is 4.302653
        assert found.difference == 2
        assert (found.low, found.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)

    def test_no_difference_at_all(self) -> None:
        found = paired(np.zeros(10))
        assert (found.difference, found.low, found.high) == (0, 0, 0)
        assert (found.p, found.p_sign_flips) == (1, 1)
        assert found.verdict is Verdict.NOT_SHOWN

    @pytest.mark.parametrize(("value", "verdict"), [(0.5, "helps"), (-0.5, "hurts")])
    def test_the_same_difference_everywhere(self, value: float, verdict: str) -> None:
        found = paired(np.full(10, value))
        assert (found.low, found.high) == (value, value)
        assert (found.p, found.p_sign_flips) == (0, 2 / 2**10)
        assert found.verdict == verdict

    def test_swapping_the_arms_turns_the_verdict(self) -> None:
        differences = np.random.default_rng(1).normal(1, 0.5, 10)
        there, back = paired(differences), paired(-differences)
        assert (there.verdict, back.verdict) == (Verdict.HELPS, Verdict.HURTS)
        assert (back.low, back.high) == (-there.high, -there.low)
        assert back.p == there.p

    def test_the_interval_holds_the_truth_as_often_as_it_says(self) -> None:
        draws = np.random.default_rng(2).normal(0.3, 1.0, (1000, 10))
        held = [found.low < 0.3 < found.high for found in map(paired, draws)]
        # 0.95, give or take four standard errors of 1000 draws.
        assert np.mean(held) == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 1000))


class TestSignFlips:
    def test_it_counts_every_choice(self) -> None:
        differences = np.random.default_rng(0).normal(0.4, 1, 9).round(2)
        sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=9)]
        as_far = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
        assert sign_flip_p(differences) == as_far

    def test_it_agrees_with_scipy(self) -> None:
        differences = np.random.default_rng(3).integers(-3, 6, 10) / 3.6
        expected = stats.permutation_test(
            (differences.round(3),), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert sign_flip_p(differences) == pytest.approx(expected.pvalue, abs=1e-12)

    @pytest.mark.parametrize("images", [599, 10_000])
    def test_sums_that_are_equal_are_counted_as_equal(self, images: int) -> None:
        """Differences are multiples of one image, which is no whole number of anything."""
        rng = np.random.default_rng(images)
        signs = np.array([*product((-1, 1), repeat=12)])
        for _ in range(20):
            right = rng.normal(4, 9, 12).round().astype(int)
            as_far = np.mean(np.abs(signs @ right) >= abs(right.sum()))
            assert sign_flip_p(100 * right / images) == as_far

    def test_many_seeds(self) -> None:
        assert sign_flip_p(np.full(60, 0.25)) == 2 / 2**60


class TestHolm:
    def test_by_hand(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_it_stops_at_1_and_takes_one_or_none(self) -> None:
        assert holm([0.6, 0.7]) == [1, 1]
        assert holm([0.04]) == [0.04]
        assert holm([]) == []

    def test_a_verdict_that_does_not_stand(self) -> None:
        rng = np.random.default_rng(0)
        base = rng.normal(90, 1, 10)
        weak = base + np.linspace(-0.5, 1.5, 10)  # p of 0.037
        strong = base + np.linspace(0.5, 1.5, 10)
        found = [
            compare(outcome(base), outcome(after, "gradient")) for after in (weak, strong, base)
        ]
        assert [c.verdict for c in found] == ["helps", "helps", "no difference shown"]
        assert [c.stands for c in as_family(found)] == [False, True, False]
        assert [c.family for c in as_family(found)] == [3, 3, 3]
        assert [c.stands for c in as_family(found[:1])] == [True]


class TestCompare:
    def test_a_planted_effect_is_found(self) -> None:
        rng = np.random.default_rng(0)
        base = rng.normal(90, 3, 10)  # the seeds differ by more than the effect
        found = compare(outcome(base), outcome(base + rng.normal(0.5, 0.3, 10), "gradient"))
        assert found.verdict is Verdict.HELPS
        assert found.base.mean == pytest.approx(base.mean())
        assert found.base.sd == pytest.approx(np.sqrt(((base - base.mean()) ** 2).sum() / 9))
        assert found.other.mean - found.base.mean == pytest.approx(found.paired.difference)
        assert found.seeds == 10

    def test_a_run_at_chance_counts(self) -> None:
        found = compare(outcome([90, 91, 92]), outcome([90, 91, 10], "gradient"))
        assert found.paired.difference == pytest.approx(-82 / 3)

    @pytest.mark.parametrize("seeds", [(0, 2, 1), (0, 1, 3)])
    def test_runs_that_are_no_pairs_are_refused(self, seeds: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="are no pairs"):
            compare(outcome([1, 2, 3]), outcome([1, 2, 3], "gradient", seeds=seeds))

    @pytest.mark.parametrize("seeds", [(0,), (4, 4)])
    def test_too_few_seeds_are_refused(self, seeds: tuple[int, ...]) -> None:
        final = np.ones(len(seeds))
        with pytest.raises(ValueError, match="two or more"):
            compare(outcome(final, seeds=seeds), outcome(final, "gradient", seeds=seeds))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_an_accuracy_that_is_none_is_named(self, value: float) -> None:
        after = outcome([1, value, 3], "gradient", seeds=(5, 6, 7))
        with pytest.raises(ValueError, match=r"'gradient' of Cell.*'digits'.*seed 6: its accuracy"):
            compare(outcome([1, 2, 3], seeds=(5, 6, 7)), after)

    def test_two_cells_are_refused(self) -> None:
        other = outcome([1, 2], "gradient", cell=replace(CELL, weight_decay=0.0))
        with pytest.raises(ValueError, match="of one cell"):
            compare(outcome([1, 2]), other)

    def test_rows_that_are_not_the_seeds_are_refused(self) -> None:
        base = outcome([1, 2])
        with pytest.raises(ValueError, match=r"loss has shape \(3, 20\)"):
            compare(base, outcome([1, 2], "gradient", loss=np.ones((3, 20))))


class TestCompareAll:
    def test_every_arm_with_the_base_of_its_cell(self) -> None:
        other = replace(CELL, optimizer="Adam")
        found = compare_all(
            [
                outcome([5, 7], "gradient", cell=other),
                outcome([1, 2]),
                outcome([1, 2], "update"),
                outcome([4, 5], cell=other),
                outcome([2, 4], "gradient"),
            ]
        )
        assert [(c.cell, c.arm, c.base.mean) for c in found] == [
            (other, "gradient", 4.5),
            (CELL, "update", 1.5),
            (CELL, "gradient", 1.5),
        ]

    def test_another_base(self) -> None:
        outcomes = [outcome([1, 2], "gradient"), outcome([2, 4], "update")]
        (found,) = compare_all(outcomes, base="gradient")
        assert (found.base_arm, found.arm, found.paired.difference) == ("gradient", "update", 1.5)

    def test_no_base(self) -> None:
        with pytest.raises(ValueError, match="no arm 'without'"):
            compare_all([outcome([1, 2], "gradient")])

    def test_an_arm_given_twice(self) -> None:
        with pytest.raises(ValueError, match="given twice"):
            compare_all([outcome([1, 2]), outcome([1, 2])])


class TestSteps:
    """Losses of 100 steps: the running mean is over 2."""

    FALLING = np.linspace(1, 0, 100)

    def test_running_mean(self) -> None:
        steps, means = running_mean(self.FALLING[None])
        assert (steps[0], steps[-1]) == (2, 100)
        assert means[0] == pytest.approx((self.FALLING[1:] + self.FALLING[:-1]) / 2)

    def test_first_step_by_hand(self) -> None:
        loss = np.array([[4.0, 2.0, 2.0, 0.0, 5.0, 0.0] + [9.0] * 94])  # means 3, 2, 1, 2.5, 2.5
        assert steps_to(loss, 3.0).tolist() == [2]
        assert steps_to(loss, 1.5).tolist() == [4]
        assert steps_to(loss, 0.5).tolist() == [np.inf]

    def test_the_level_is_that_of_the_median_run_at_half_of_training(self) -> None:
        loss = np.stack([self.FALLING, self.FALLING + 1, self.FALLING + 7])
        assert half_way_loss(loss) == pytest.approx(1 + self.FALLING[48:50].mean())
        assert steps_to(loss, half_way_loss(loss)).tolist() == [2, 50, np.inf]

    def test_half_as_many_steps(self) -> None:
        once = np.stack([np.linspace(1, 0, 100)] * 6)
        twice = np.maximum(1 - 2 * (1 - once), 0)
        found = compare(
            outcome(np.arange(6), loss=once), outcome(np.arange(6), "gradient", loss=twice)
        ).steps
        # The mean at step k is 1 - (k - 1.5) / 99, and falls twice as fast: 2 (k - 1.5) >= 48.5.
        assert (set(found.base), set(found.other)) == ({50}, {26})
        assert found.ratio == 26 / 50
        assert found.p == stats.binomtest(0, 6).pvalue

    def test_a_run_that_never_comes_down_takes_longer_than_any(self) -> None:
        base = np.stack([self.FALLING] * 5)
        never = np.stack([np.ones(100), *[self.FALLING] * 4])
        found = compare(
            outcome(np.arange(5), loss=base), outcome(np.arange(5), "gradient", loss=never)
        ).steps
        assert found.other[0] == np.inf
        assert found.ratio == 1
        assert found.p == 1  # one pair differs
        diverged = np.full((5, 100), np.nan)
        found = compare(
            outcome(np.arange(5), loss=base), outcome(np.arange(5), "gradient", loss=diverged)
        ).steps
        assert found.ratio == np.inf
        assert found.p == stats.binomtest(5, 5).pvalue

    def test_a_base_that_diverged_has_no_level(self) -> None:
        diverged = np.full((4, 100), np.nan)
        found = compare(
            outcome(np.arange(4), loss=diverged),
            outcome(np.arange(4), "gradient", loss=np.stack([self.FALLING] * 4)),
        ).steps
        assert found.level == np.inf
        assert np.isnan(found.ratio)
        assert found.p == 1

    def test_a_training_of_one_step(self) -> None:
        loss = np.array([[2.0], [3.0]])
        found = compare(outcome([1, 2], loss=loss), outcome([1, 2], "gradient", loss=loss)).steps
        assert (found.level, found.ratio) == (2.5, 1)
