"""`gcx.diagnostics` on gradients of every library: the shares, the table and the chart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from importlib.machinery import PathFinder
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcx import Layout
from gcx.diagnostics import EnergyReport, Share, energy_removed
from gcx.layout import as_layout
from gcx.plan import Plan, PlanRow

from libraries import ArrayLibrary
from reference import fan_in_means

CASES = [("o...", (5, 6), (1,)), ("o...", (4, 3, 2, 2), (1, 2, 3)), ("io...", (3, 4, 2), (0, 2))]
CASES += [("...o", (7, 3), (0,)), ("ioo", (6, 2, 3), (0,)), ("oio", (2, 5, 3), (1,))]
CASES += [(Layout("(bi)o...", b=2), (4, 2, 3), (1, 3))]  # of the axes after the split


def values(seed: int, *shape: int, loc: float = 0.3) -> Any:
    return np.random.default_rng(seed).normal(loc, size=shape)


def energies(grad: Any, axes: tuple[int, ...]) -> tuple[float, float]:
    """What centralization removes, and all there is: by Proposition 4.2, in exact means."""
    fan_in = np.prod([grad.shape[axis] for axis in axes])
    removed = fan_in * np.sum(np.abs(fan_in_means(grad, axes)) ** 2)
    wide = np.asarray(grad, np.result_type(grad, np.float64))
    return float(removed), float(np.sum(np.abs(wide) ** 2))


def share_of(report: EnergyReport) -> Share:
    """The share of the first weight."""
    return next(iter(report.shares.values()))


@pytest.mark.parametrize(("layout", "shape", "axes"), CASES)
def test_share_is_that_of_the_reference(
    layout: Any, shape: tuple[int, ...], axes: tuple[int, ...], xp: ArrayLibrary
) -> None:
    view, _ = as_layout(layout).split(shape)
    for dtype in ("float32", "float64", "complex64", "complex128", *xp.narrow_dtypes):
        imaginary = 1j * values(1, *shape, loc=-0.5) if "complex" in dtype else 0
        grad = xp.asarray(values(0, *shape) + imaginary, dtype)
        removed, total = energies(xp.numpy(grad).reshape(view), axes)
        share = share_of(energy_removed([[grad]], layouts=layout))
        assert share.removed == pytest.approx(removed / total, rel=1e-13)
        assert share.lowest == share.highest == share.removed
        assert share.by_chance == 1 / np.prod([view[axis] for axis in axes])


@contextmanager
def in_single_precision(xp: ArrayLibrary) -> Iterator[None]:
    """JAX has no float64 unless the process enables it."""
    if xp.name != "jax":
        yield
        return
    import jax

    jax.config.update("jax_enable_x64", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", True)


def test_sums_are_in_double_precision(xp: ArrayLibrary) -> None:
    """The variance is 1e-8 of the energy: float32 would not see it, nor bfloat16 the mean."""
    with in_single_precision(xp):
        grad = xp.asarray(values(0, 2, 50_000, loc=1e4), "float32")
        share = share_of(energy_removed([[grad]]))
    removed, total = energies(xp.numpy(grad), (1,))
    assert 1 - share.removed == pytest.approx(1 - removed / total, rel=1e-5)


def test_of_one_sample_it_is_the_angle_between_the_input_and_the_ones() -> None:
    """As the documentation derives it."""
    x, errors = values(0, 6), values(1, 4)
    cosine = x.sum() / (np.linalg.norm(x) * 6**0.5)
    share = share_of(energy_removed([[np.outer(errors, x)]]))
    assert share.removed == pytest.approx(cosine**2, rel=1e-12)


def test_elements_without_a_common_direction_give_the_share_by_chance() -> None:
    rng = np.random.default_rng(0)
    for draw in (rng.standard_normal((4000, 50)), rng.standard_exponential((4000, 50)) - 1):
        share = share_of(energy_removed([[draw]]))
        assert share.removed == pytest.approx(share.by_chance, rel=0.1)  # 3 standard errors


def test_batches_count_by_their_energy() -> None:
    batches = [np.array([[3.0, 1.0]]), np.array([[1e-6, -1e-6]]), np.array([[2.0, 2.0]])]
    share = share_of(energy_removed([[grad] for grad in batches]))
    assert share.removed == pytest.approx((8 + 0 + 8) / (10 + 2e-12 + 8), rel=1e-14)
    assert (share.lowest, share.highest) == (0.0, 1.0)


def test_total_is_that_of_all_parameters() -> None:
    grads = {"weight": np.array([[3.0, 1.0]]), "bias": np.array([2.0, 0.0])}
    report = energy_removed([grads, {"weight": np.array([[1.0, 1.0]]), "bias": np.zeros(2)}])
    assert report.batches == 2
    assert report.total is not None
    assert report.total.removed == pytest.approx((8 + 2) / (14 + 2))
    assert (report.total.lowest, report.total.highest) == (pytest.approx(8 / 14), 1.0)
    assert report.total.by_chance == pytest.approx((10 + 2) / 2 / (14 + 2))


def test_a_generator_is_gone_through_once(xp: ArrayLibrary) -> None:
    numbers = [values(seed, 3, 4) for seed in range(3)]
    arrays = [xp.asarray(x) for x in numbers]
    report = energy_removed([array] for array in arrays)
    assert report.batches == 3
    expected = np.sum([energies(x, (1,)) for x in numbers], axis=0)
    assert share_of(report).removed == pytest.approx(expected[0] / expected[1], rel=1e-13)
    for array, x in zip(arrays, numbers, strict=True):  # which are as they were
        np.testing.assert_array_equal(xp.numpy(array), x)


def test_libraries_may_be_mixed(pair: tuple[ArrayLibrary, ArrayLibrary]) -> None:
    x = values(0, 4, 5)
    one, other = (library.asarray(x) for library in pair)
    first, second = energy_removed([[one, other]]).shares.values()
    assert first.removed == pytest.approx(second.removed, rel=1e-14)


def test_what_is_left_alone_has_its_reason() -> None:
    grads = {
        "kernel": np.ones((3, 2)), "head": np.ones((4, 1)), "bias": np.ones(2), "norm": np.ones(()),
        "embedding": np.ones((9, 2)),
    }  # fmt: skip
    layouts = {"embedding": None, "head": "o...", "*": "...o"}
    report = energy_removed([grads], layouts=layouts)
    assert {row.name: (row.layout, row.reason) for row in report.plan} == {
        "kernel": (Layout("...o"), "as given"),
        "head": (None, "fan-in 1: subtracting its mean would freeze it"),
        "bias": (None, "a vector has no fan-in"),
        "norm": (None, "a scalar has no fan-in"),
        "embedding": (None, "left alone by layouts"),
    }
    assert [*report.shares] == ["kernel"]


def test_a_plan_gives_the_reasons() -> None:
    rows = [
        ("w", (1, 2), "oi", "Linear"),
        ("unused", (1, 2), "oi", "Linear"),
        ("b", (2,), None, "bias"),
    ]
    plan = Plan(
        PlanRow(name, shape, layout and Layout(layout), why) for name, shape, layout, why in rows
    )
    grads = {"b": np.ones(2), "w": np.array([[3.0, 1.0]]), "unused": None}
    report = energy_removed([grads], layouts=plan)
    assert report.plan == Plan([plan[2], plan[0], plan[1]._replace(reason="Linear; no gradient")])
    assert report.shares == {"w": Share(0.8, 0.8, 0.8, 0.5)}


def test_a_gradient_that_some_batches_lack() -> None:
    grad = np.array([[3.0, 1.0]])
    report = energy_removed(
        [{"a": None, "b": grad}, {"a": grad, "b": grad}, {"a": None, "b": None}]
    )
    assert [row.shape for row in report.plan] == [(1, 2), (1, 2)]
    assert [share.removed for share in report.shares.values()] == [0.8, 0.8]


def test_zero_gradient_has_no_share() -> None:
    report = energy_removed([[np.zeros((2, 3)), np.ones((2, 3))]] * 2)
    assert report.plan[0].reason == "as given; zero gradient"
    assert [*report.shares] == ["1"]
    assert report.total == Share(1.0, 1.0, 1.0, 1 / 3)
    assert energy_removed([[np.zeros((2, 3))]]).total is None
    # Nor is its batch in the range.
    batches = [[np.zeros((1, 2))], [np.array([[3.0, 1.0]])]]
    assert share_of(energy_removed(batches)) == Share(0.8, 0.8, 0.8, 0.5)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_is_told(bad: float, xp: ArrayLibrary) -> None:
    numbers = {"weight": [[1.0, 1.0], [2.0, 3.0]], "bias": [1.0, 1.0], "good": [[1.0, 2.0]]}
    fine = {name: xp.asarray(x, "float32") for name, x in numbers.items()}
    wrong = {"weight": [[bad, 1.0], [2.0, 3.0]], "bias": [bad, 1.0]}  # one element is enough
    bad_ones = {name: xp.asarray(x, "float32") for name, x in wrong.items()}
    report = energy_removed([fine | bad_ones, fine])
    told = "NaN or infinity in the gradient of 1 of 2 batches"
    assert [row.reason.partition("; ")[2] for row in report.plan] == [told, told, ""]
    assert [*report.shares] == ["good"]
    assert report.total is None


def test_nothing_to_measure() -> None:
    used_up = iter([[np.ones((2, 2))]])
    energy_removed(used_up)
    for batches in ([], used_up):
        with pytest.raises(ValueError, match="grads is empty; if it is an iterator"):
            energy_removed(batches)
    with pytest.raises(ValueError, match="no gradient in any batch"):
        energy_removed([{"a": None}, {"a": None}])
    for batch, kinds in (
        ({"weight": np.ones((2, 3))}, "dict of str"),
        ([np.ones(2)], "list of nd"),
    ):
        with pytest.raises(TypeError, match=f"this is a {kinds}.*of a single batch, give .grads"):
            energy_removed(batch)


def test_gradients_and_layouts_that_do_not_fit_are_named() -> None:
    one = {"a": np.ones((2, 2))}
    with pytest.raises(TypeError, match="a/1: expected a real or complex floating dtype, not int"):
        energy_removed([{"a": [np.ones((2, 2)), np.ones((2, 2), int)]}])
    with pytest.raises(TypeError, match="a: expected an array"):
        energy_removed([{"a": 1.0}])
    with pytest.raises(ValueError, match=r"a has shape \(2, 4\), and \(2, 2\) before"):
        energy_removed([one, {"a": np.ones((2, 4))}])


@pytest.fixture
def report() -> EnergyReport:
    grads = {
        "conv": np.array([[[3.0, 1.0]]]), "<b>": np.ones(2), "still": np.zeros((1, 4)),
        "even": np.array([[1.0, 0.0]]),
    }  # fmt: skip
    layouts = {"<b>": None, "*": "o..."}
    return energy_removed([grads, {**grads, "conv": np.array([[[1.0, 1.0]]])}], layouts=layouts)


def test_table(report: EnergyReport) -> None:
    assert str(report).splitlines() == [
        "parameter       shape  layout  removed    in batches  by chance  reason",
        "conv            1x1x2  o...      83.3%   80% to 100%        50%  as given",
        "<b>             2      -             -             -          -  left alone by layouts",
        "still           1x4    o...          -             -          -  as given; zero gradient",
        "even            1x2    o...        50%    50% to 50%        50%  as given",
        "whole gradient                   61.1%  50% to 65.4%      38.9%",
        "3 of 4 parameters centralized, 2 batches",
    ]
    # Next to nothing is not zero.
    assert "  <0.001%  " in str(energy_removed([[np.array([[1.0, -0.999]])]]))
    assert "  0%  " in str(energy_removed([[np.array([[1.0, -1.0]])]]))


def test_html_is_the_text_escaped(report: EnergyReport) -> None:
    html = report._repr_html_()
    assert "<b>" not in html
    assert unescape(html) == f"<pre>{report}</pre>"


def test_chart_shows_the_shares(report: EnergyReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = report.bar_chart()
    (axes,) = figure.axes
    expected = report.shares.values()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv", "even"]
    assert [bar.get_width() for bar in axes.patches] == [share.removed for share in expected]
    (marks,) = [line for line in axes.lines if line.get_label() == "by chance: 1 / fan-in"]
    assert list(marks.get_xdata()) == [share.by_chance for share in expected]
    (whiskers,) = axes.collections
    ends = [segment[:, 0] for segment in whiskers.get_segments()]
    np.testing.assert_allclose(ends, [(share.lowest, share.highest) for share in expected])
    assert axes.get_xlabel() == "share of the gradient's energy that GC removes"
    assert axes.get_title() == "Gradient Centralization, 2 batches"
    figure.savefig(tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


def test_no_chart(report: EnergyReport, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"there is no share to draw:(?s:.*)zero gradient"):
        energy_removed([[np.zeros((2, 2))]]).bar_chart()
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(PathFinder, "find_spec", lambda *_: None)
    with pytest.raises(ImportError, match=r"matplotlib.*; pip install matplotlib$"):
        report.bar_chart()
