"""One contract for all adapters: each fact once, for each row that a run asks for.

A row lacks a fact for a reason that it states; the test of that fact must fail.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcx import Layout
from gcx.testing import assert_centralized

import canonical_order
import copies
from adapter import WEIGHTS, Adapter, Arrays, Kind, accuracy, start, trained_by_hand
from same_bits import assert_same_bits

pytestmark = pytest.mark.one_framework

# Means move by more than a hundred times the rounding of any of the dtypes.
MOVED = 1e-3

New = Callable[..., Adapter]


@pytest.fixture
def new(adapter: type[Adapter], tmp_path: Path) -> New:
    def make(kind: Kind, dtype: str | None = None) -> Adapter:
        return adapter(kind, tmp_path, dtype)

    return make


def assert_means_kept(row: Adapter, before: Arrays) -> None:
    """Corollary 4.1, which also fails if nothing was trained."""
    for name, weight in row.weights().items():
        assert_centralized(weight.astype(row.dtype), start=before[name].astype(row.dtype))


def means_moved(row: Adapter, before: Arrays) -> float:
    now = row.weights()
    return min(float(np.abs((now[n] - before[n]).mean(1)).max()) for n in WEIGHTS)


def assert_same(row: Adapter, other: Adapter | Arrays) -> None:
    expected = other if isinstance(other, dict) else other.parameters()
    for name, found in row.parameters().items():
        assert_same_bits(found, expected[name])


@pytest.mark.parametrize("strength", [1.0, 0.5], ids=["whole", "strength"])
def test_sgd_learns_digits_as_by_hand(new: New, where: Any, strength: float) -> None:
    row = new("sgd")
    before = row.weights()
    row.attach(where=where, **({} if strength == 1.0 else {"strength": strength}))
    row.train()
    found, expected = row.parameters(), trained_by_hand(row.rate, row.momentum, strength)
    for name, by_hand in expected.items():
        atol = 1e-12 if row.dtype == "float64" else 1e-5
        np.testing.assert_allclose(found[name], by_hand, rtol=0, atol=atol)
    if strength == 1.0:
        assert accuracy(found) > 0.85
        assert_means_kept(row, before)
    else:
        assert means_moved(row, before) > MOVED


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_without_it_the_means_move(new: New, kind: Kind) -> None:
    row = new(kind)
    before = row.weights()
    row.train()
    assert means_moved(row, before) > MOVED


def test_adam_keeps_the_means_in_the_update_alone(new: New, where: Any) -> None:
    row = new("adam")
    before = row.weights()
    row.attach(where=where)
    row.train(8)
    if where == "update":
        assert_means_kept(row, before)
    else:
        assert means_moved(row, before) > MOVED


def test_reproducible_steps_have_the_canonical_bits(new: New, where: Any) -> None:
    """The first step of SGD, whose rate is a power of two."""
    row, other = new("sgd"), new("sgd")
    before, rng = row.weights(), np.random.default_rng(1)
    gradients = {n: rng.normal(0.3, 1.0, w.shape).astype(row.dtype) for n, w in before.items()}
    row.attach(where=where, reproducible=True)
    other.attach(where=where)
    row.step(gradients)
    other.step(gradients)
    for name, weight in row.weights().items():
        w, step = before[name].astype(row.dtype), (row.rate * gradients[name]).astype(row.dtype)
        if where == "gradient" or row.projects_the_update:
            expected = w - canonical_order.centralized(step, (1,), row.dtype)
        else:
            expected = (w - step) - (canonical_means(w - step) - canonical_means(w))
        assert_same_bits(weight.astype(row.dtype), expected)
        assert not np.array_equal(other.weights()[name], weight)


def canonical_means(x: Any) -> Any:
    return np.array([[canonical_order.scaled_mean(unit, 1.0)] for unit in x])


def test_remove_gives_plain_training_back(new: New, where: Any) -> None:
    row, twin = new("adam"), new("adam")
    row.attach(where=where)
    row.remove()
    row.remove()
    row.train(4)
    twin.train(4)
    assert_same(row, twin)


def test_remove_and_attach_in_mid_training(new: New, where: Any) -> None:
    row = new("sgd")
    row.attach(where=where)
    row.train(4)
    first = getattr(row, "handle", None)
    row.remove()
    row.attach(where=where)
    if first is not None:
        first.remove()  # which does nothing, least of all to the second
    before = row.weights()
    row.train(4)
    assert_means_kept(row, before)
    row.remove()
    before = row.weights()
    row.train()
    assert means_moved(row, before) > MOVED


def test_momentum_from_before(new: New, where: Any) -> None:
    row = new("sgd")
    row.train(4)
    before = row.weights()
    warns = where == "gradient" and row.warns_of_momentum
    with pytest.warns(UserWarning, match=r"momentum of 2 weights") if warns else nullcontext():
        row.attach(where=where)
        row.train(4)
    assert_means_kept(row, before)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_checkpoint_goes_on(new: New, where: Any, kind: Kind) -> None:
    """To the same bits, and without a warning."""
    row = new(kind)
    row.attach(where=where)
    row.train(4)
    other = row.resumed()
    row.train(4)
    other.train(4)
    assert_same(other, row)


@pytest.mark.parametrize("how", copies.COPIES)
def test_copies_are_plain_and_warn(new: New, how: str) -> None:
    row = new("sgd")
    row.attach()
    row.train(4)
    with pytest.warns(UserWarning, match=r"copy of this \w+ does not centralize") as caught:
        twin = copies.COPIES[how](row)
    if row.warns_at_the_line:
        assert {warning.filename for warning in caught} <= {__file__, copies.__file__}
    assert_same(twin, row)
    before = twin.weights()
    twin.train()
    assert means_moved(twin, before) > MOVED
    for one in (row, twin):
        before = one.weights()
        if one is twin:
            twin.attach(where="update")
        one.train(4)
        assert_means_kept(one, before)


@pytest.mark.parametrize("how", copies.COPIES)
def test_copies_go_on_alike(new: New, how: str) -> None:
    row = new("sgd")
    row.attach()
    row.train(4)
    twin, before = copies.COPIES[how](row), row.weights()
    for one in (row, twin):
        one.train(4)
        assert_means_kept(one, before)
    assert_same(twin, row)


def test_the_plan_names_the_weights(new: New) -> None:
    row = new("sgd")
    row.attach()
    row.train(1)
    assert {r.name for r in row.plan() if r.layout} == set(row.names.values())
    assert [r.reason for r in row.plan() if not r.layout] == [row.of_bias] * 2
    assert "2 of 4 parameters centralized" in repr(row.plan())


# A weight, and the same layout for rows and for columns: of which the fan-in is the other axis, and
# of which each half of the fan-in has a mean of its own.
LAYOUTS = {
    "turned": ("output", Layout("io"), Layout("oi")),
    "split": ("hidden", Layout("o(bi)", b=2), Layout("(bi)o", b=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reproducible", [False, True])
def test_overrides_reach_the_step(new: New, where: Any, layout: str, reproducible: bool) -> None:
    row = new("sgd")
    before = row.weights()
    name, by_rows, by_columns = LAYOUTS[layout]
    given = by_rows if row.has_rows else by_columns
    row.attach(where=where, overrides={row.names[name]: given}, reproducible=reproducible)
    row.train(8)
    for other, end in row.weights().items():
        start, expected = before[other].astype(row.dtype), by_rows if other == name else "oi"
        assert_centralized(end.astype(row.dtype), start=start, layout=expected)
        is_turned = np.abs((end - start).mean(1)).max() > MOVED
        assert is_turned == (layout == "turned" and other == name)


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"absent*": None}, r"'absent\*' matches no parameter"),
    ({"hidden": "ooi"}, r"layout 'ooi'|does not fit Layout\('ooi'\)"),
]


@pytest.mark.parametrize(("overrides", "message"), MISFITS)
def test_overrides_that_do_not_fit(new: New, overrides: dict[str, Any], message: str) -> None:
    row = new("sgd")
    overrides = {row.names.get(name, name): layout for name, layout in overrides.items()}
    with pytest.raises(ValueError, match=message):
        attach_and_train(row, overrides=overrides)
    assert_same(row, start(row.dtype))


OF_STRENGTH = "strength is the part of the mean to subtract, from 0 to 1"
WRONG: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "where": [("weights", ValueError, "where is one of 'gradient', 'update'.* not 'weights'")],
    "decay": [("in", ValueError, "decay is one of None, 'inside', 'outside', not 'in'")],
    "strength": [(value, ValueError, OF_STRENGTH) for value in (2, "1")],
    "layers": [("linear", ValueError, "layers is one of 'all', 'conv', not 'linear'")],
    "overrides": [
        ("conv", TypeError, "overrides is a mapping from names to layouts"),
        ({"a.*": "ox"}, ValueError, r"overrides: a\.\*: layout 'ox' is not valid"),
        ({"a": "(bi)o"}, ValueError, "overrides: a: .*give the size of all parts"),
    ],
    "reproducible": [("no", ValueError, "reproducible is one of True, False, not 'no'")],
    "wher": [
        ("update", TypeError, r"^(GradientCentralization|SGD|centralize)[._]*\w*\(\) .*'wher'")
    ],
}


@pytest.mark.parametrize("option", WRONG)
def test_options_are_checked_where_they_are_given(new: New, option: str) -> None:
    for value, error, message in WRONG[option]:
        with pytest.raises(error, match=message):
            new("sgd").attach(**{option: value})


def attach_and_train(row: Adapter, **options: Any) -> None:
    """A trainer attaches when training begins."""
    row.attach(**options)
    row.train(1)


def test_attaching_twice(new: New) -> None:
    row = new("sgd")
    row.attach()
    with pytest.raises(
        ValueError, match=r"Gradient Centralization already; first call .*\.remove\(\)"
    ):
        attach_and_train(row, where="update")
    assert_same(row, start(row.dtype))


def test_nothing_to_centralize(new: New) -> None:
    row = new("sgd")
    with pytest.raises(ValueError, match=r"nothing to centralize|centralizes no parameter"):
        attach_and_train(row, overrides={"*": None})
    assert_same(row, start(row.dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_warn(new: New, dtype: str) -> None:
    """Rounding of the weights moves the means, and `where="update"` restores these."""
    new("sgd", dtype).attach()
    row = new("sgd", dtype)
    text = rf"(weight|kernel) is (torch\.)?{dtype}.*where='gradient'"
    with pytest.warns(UserWarning, match=text) as caught:
        attach_and_train(row, where="update")
    (ours,) = (each for each in caught if re.search(text, str(each.message)))
    if row.warns_at_the_line:
        assert Path(ours.filename).parent == Path(__file__).parent


def test_a_row_lacks_nothing_but_facts(adapter: type[Adapter]) -> None:
    tests = [name for name in globals() if name.startswith("test_")]
    for name in adapter.lacks:
        assert name in {*WRONG, "update"} or any(t.startswith(name.split("[")[0]) for t in tests)
