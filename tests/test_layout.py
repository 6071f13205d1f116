"""Layouts: letters to axes, and stacks and parentheses against loops over the groups."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gcx
from gcx.layout import as_layout
from gcx.optim import SGD
from gcx.plan import Plan, PlanRow
from gcx.testing import assert_centralized

from libraries import ArrayLibrary
from reference import centralized


def test_scalars_and_vectors_have_no_fan_in_unless_a_vector_is_one() -> None:
    for text in ("o...", "...o", "io...", "oi", "io", "ioo", "oio", "b...", "bi", "bo...", "bio"):
        assert gcx.Layout(text).fan_in_axes(0) == gcx.Layout(text).fan_in_axes(1) == ()
    for text in ("...", "i"):
        assert gcx.Layout(text).fan_in_axes(1) == (0,)


@given(
    head=st.text("oi", max_size=5),
    tail=st.text("oi", max_size=5),
    unnamed=st.none() | st.integers(0, 30),
)
@settings(derandomize=True, deadline=None)
def test_axes_are_the_places_of_i(head: str, tail: str, unnamed: int | None) -> None:
    letters = head + "i" * (unnamed or 0) + tail
    text = head + tail if unnamed is None else f"{head}...{tail}"
    assume("i" in text.replace("...", "i") and len(letters) > 1)
    places = tuple(match.start() for match in re.finditer("i", letters))
    assert gcx.Layout(text).fan_in_axes(len(letters)) == places


@pytest.mark.parametrize("value", [None, 1, b"o...", ["o", "..."], (0, 1)])
def test_only_text_is_a_layout(value: object) -> None:
    for make in (gcx.Layout, as_layout):
        with pytest.raises(TypeError, match=f"a layout is a string.*not {type(value).__name__}"):
            make(value)


@pytest.mark.parametrize(
    ("text", "ndim", "message"),
    [
        ("ioo", 2, "layout 'ioo' is for arrays of rank 3, not 2"),
        ("oi", 3, "layout 'oi' is for arrays of rank 2, not 3"),
        ("i", 2, "layout 'i' is for arrays of rank 1, not 2"),
        ("ooi...", 2, "layout 'ooi...' is for arrays of rank at least 3, not 2"),
        ("oi", 12, "layout 'oi' is for arrays of rank 2, not 12"),
        ("o" * 8 + "i", 10, "layout 'ooooooooi' is for arrays of rank 9, not 10"),
        *[(text, ndim, f"not {ndim}") for text in ("o...", "...") for ndim in (-1, -9)],
    ],
)
def test_a_rank_that_does_not_fit_is_refused(text: str, ndim: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gcx.Layout(text).fan_in_axes(ndim)


@pytest.mark.parametrize(
    ("text", "sizes", "shown"),
    [("io...", {}, "Layout('io...')"), ("(bi)o...", {"b": 2}, "Layout('(bi)o...', b=2)")],
)
def test_layouts_are_values(text: str, sizes: dict[str, int], shown: str) -> None:
    layout = gcx.Layout(text, **sizes)
    assert (str(layout), repr(layout), layout.sizes) == (text, shown, sizes)
    assert layout == gcx.Layout(text, **sizes) != gcx.Layout("(bi)o...", b=4)
    assert layout not in (text, gcx.Layout("oi..."))
    assert len({layout, gcx.Layout(text, **sizes), gcx.Layout("...o")}) == 2
    assert as_layout(layout) is layout
    for clone in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert clone(layout) == layout
        assert clone(layout).split((8, 4)) == layout.split((8, 4))


def values(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape)


def by_group(x: Any, groups: int) -> Any:
    """Centralize the weight of a transposed convolution group by group: (in, out, kernel...)."""
    axes = (0, *range(2, x.ndim))
    return np.concatenate([centralized(part, axes) for part in np.split(x, groups)])


def by_outputs(x: Any, outputs: int) -> Any:
    """Centralize (stack, out * in), an expert and an output unit at a time."""
    return np.stack([centralized(entry.reshape(outputs, -1), (1,)).ravel() for entry in x])


GROUPS = gcx.Layout("(bi)o...", b=2)
FLAT = gcx.Layout("b(oi...)", o=4)
CASES = [
    (GROUPS, (8, 4, 3, 3), lambda x: by_group(x, 2)),
    (gcx.Layout("(bi)o", b=4), (8, 3), lambda x: by_group(x, 4)),
    (gcx.Layout("(bi)o...", i=2), (6, 4, 3), lambda x: by_group(x, 3)),
    (FLAT, (3, 24), lambda x: by_outputs(x, 4)),
    (gcx.Layout("o(ib)", i=2), (3, 6), lambda x: x - x.reshape(3, 2, 3).mean(1)[:, [0, 1, 2] * 2]),
    (gcx.Layout("bio"), (3, 4, 5), lambda x: centralized(x, (1,))),
    (gcx.Layout("boi"), (3, 4, 5), lambda x: centralized(x, (2,))),
    (gcx.Layout("b...o"), (3, 2, 4, 5), lambda x: centralized(x, (1, 2))),
]


@pytest.mark.parametrize(
    ("layout", "shape", "expected"), CASES, ids=[repr(layout) for layout, *_ in CASES]
)
def test_every_unit_of_every_entry_is_centralized(
    xp: ArrayLibrary, layout: gcx.Layout, shape: tuple[int, ...], expected: Any
) -> None:
    x = values(*shape)
    grad = xp.asarray(x.astype(np.float32))
    result = gcx.centralize(grad, layout=layout)
    assert tuple(result.shape) == shape
    np.testing.assert_allclose(xp.numpy(result), expected(x), atol=2e-6)
    assert_centralized(result, layout=layout)
    many = gcx.centralize_many([grad, grad], layouts=[layout, None])
    assert many[1] is grad
    np.testing.assert_array_equal(xp.numpy(grad), x.astype(np.float32))
    written = [many[0]]
    if xp.is_writable:
        written += [xp.asarray(0 * x)]
        gcx.centralize_many([grad], layouts=[layout], out=written[1:])
        written += [gcx.centralize(grad, layout=layout, out=grad)]
        assert written[2] is grad
    for found in written:
        np.testing.assert_array_equal(xp.numpy(found), xp.numpy(result))


def test_transposed_strides_are_seen_through() -> None:
    x = values(3, 8)
    found = gcx.centralize(x.T, layout=gcx.Layout("(bi)o", b=2))
    np.testing.assert_allclose(found, by_group(np.ascontiguousarray(x.T), 2))


@given(groups=st.integers(1, 4), inputs=st.integers(1, 4), outputs=st.integers(1, 3))
@settings(derandomize=True, deadline=None)
def test_sizes_say_the_same_from_either_side(groups: int, inputs: int, outputs: int) -> None:
    shape = (groups * inputs, outputs)
    outer, inner = gcx.Layout("(bi)o", b=groups), gcx.Layout("(bi)o", i=inputs)
    assert outer.split(shape) == inner.split(shape) == ((groups, inputs, outputs), (1,))


@pytest.mark.parametrize("shape", [(7, 4, 3), (9, 4)])
def test_a_shape_that_does_not_fit_is_an_error(shape: tuple[int, ...]) -> None:
    grad = np.ones(shape)
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        gcx.centralize(grad, layout=GROUPS)
    out = {"w": np.zeros(shape)}
    with pytest.raises(ValueError, match=r"^w: "):
        gcx.centralize_many({"w": grad}, layouts=GROUPS, out=out)
    assert not out["w"].any()


def test_scalars_and_biases_are_passed_through() -> None:
    for grad in (np.ones(()), np.ones(8)):
        assert gcx.centralize(grad, layout=GROUPS) is grad
        assert GROUPS.split(grad.shape) == (grad.shape, ())
    assert gcx.Layout("(bi)", b=2).split((8,)) == ((2, 4), (1,))


def test_all_sizes_may_be_given_and_must_fit() -> None:
    layout = gcx.Layout("(bi)o", b=np.int64(2), i=3)
    assert layout.split((6, 4)) == ((2, 3, 4), (1,))
    with pytest.raises(ValueError, match=r"does not fit shape \(12, 4\): 12 is not equal to 6"):
        layout.split((12, 4))
    with pytest.raises(ValueError, match=r"does not fit shape \(8,\)"):  # though it has no fan-in
        gcx.Layout("(bo)...", b=3).split((8,))


@pytest.mark.parametrize(
    ("text", "sizes", "error", "message"),
    [
        ("(bi)o", {}, ValueError, r"give the size of all parts but one.*Layout\('\(bi\)o', b=2\)"),
        ("o...", {"o": 2}, ValueError, "^o=2 .*layout 'o...' has no part 'o' in parentheses"),
        ("(bi)o", {"o": 2}, ValueError, "has no part 'o'"),
        ("(bi)(bo)", {"b": 1}, ValueError, "has several parts 'b'"),
        ("(bi)o", {"b": 0}, ValueError, "at least 1, not 0"),
        *[
            ("(bi)o", {"b": x}, TypeError, rf"layout '\(bi\)o': .* 'b' is an integer, not {x!r}")
            for x in (2.0, True, "2")
        ],
        *[
            (text, {}, ValueError, "is not valid")
            for text in ("(b)i", "(bi", "bi)", "((bi))o", "(ii)o", "()i", "(b....)", "...(b...)")
        ],
        ("HWIO", {}, ValueError, r"of an axis; 'HWIO' is '\.\.\.io' here$"),
        ("OIDHW", {}, ValueError, r"of an axis; 'OIDHW' is 'oi\.\.\.' here$"),
        *[(text, {}, ValueError, "parts of an axis$") for text in ("NCHW", "HIWO")],
        *[
            (text, {}, ValueError, rf"layout '{re.escape(text)}' is not valid.*'o'.*'i'")
            for text in ("xyz", "O...", "o i", "o...i...", "......", "....", "..", "oi.", "12")
        ],
        *[
            (text, {}, ValueError, f"layout '{text}' names no fan-in axis")
            for text in ("", "o", "oo", "ooo", "bo")
        ],
    ],
)
def test_sizes_that_settle_nothing_are_refused(
    text: str, sizes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gcx.Layout(text, **sizes)


def test_letters_are_spelled_out() -> None:
    assert GROUPS.letters(4) == "bioii"
    assert FLAT.letters(2) == "boi"
    assert gcx.Layout("b...o").letters(4) == "biio"
    with pytest.raises(ValueError, match="is for arrays of rank at least 2, not 1"):
        GROUPS.letters(1)
    with pytest.raises(ValueError, match=r"splits an axis of the array; use split\(shape\)"):
        GROUPS.fan_in_axes(4)


PLAN = Plan(
    [
        PlanRow("up.weight", (8, 4, 3), GROUPS, "ConvTranspose1d, 2 groups"),
        PlanRow("up.bias", (8,), None, "bias"),
        PlanRow("head.weight", (3, 4), gcx.Layout("o..."), "Linear"),
    ]
)


def test_a_plan_is_taken_as_layouts(xp: ArrayLibrary) -> None:
    weights = {row.name: values(*row.shape).astype(np.float32) for row in PLAN}
    grads = {name: xp.asarray(x) for name, x in weights.items()}
    found = gcx.centralize_many(grads, layouts=PLAN)
    assert found["up.bias"] is grads["up.bias"]
    up, head = by_group(weights["up.weight"], 2), centralized(weights["head.weight"], (1,))
    np.testing.assert_allclose(xp.numpy(found["up.weight"]), up, atol=2e-6)
    np.testing.assert_allclose(xp.numpy(found["head.weight"]), head, atol=2e-6)
    fewer = gcx.centralize_many({**grads, "head.weight": None}, layouts=PLAN)
    assert fewer["head.weight"] is None


def test_a_gradient_that_the_plan_does_not_know_is_an_error() -> None:
    grads = {"head.weight": values(3, 4), "haed.weight": values(3, 4)}
    before = {name: grad.copy() for name, grad in grads.items()}
    with pytest.raises(ValueError, match=r"layouts: the plan has no row 'haed.weight'; .*'head.we"):
        gcx.centralize_many(grads, layouts=PLAN, out=grads)
    with pytest.raises(ValueError, match=r"head.weight: the plan is for shape \(3, 4\).*\(4, 3\)"):
        gcx.centralize_many({"head.weight": values(4, 3)}, layouts=PLAN)
    with pytest.raises(ValueError, match=r"up.bias: the plan is for shape \(8,\).*\(7,\)"):
        gcx.centralize_many({"up.bias": values(7)}, layouts=PLAN)
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, before[name])


def test_optimizers_take_a_plan(xp: ArrayLibrary) -> None:
    params = {row.name: xp.asarray(values(*row.shape), "float32") for row in PLAN}
    optimizer = SGD(0.1, layouts=PLAN)
    state = optimizer.init(params)
    trained, _ = optimizer.update(params, {n: p * p for n, p in params.items()}, state)
    for row in PLAN:
        if row.layout is not None:
            assert_centralized(trained[row.name], start=params[row.name], layout=row.layout)
    with pytest.raises(ValueError, match="the plan has no row 'other'"):
        optimizer.init({"other": params["up.bias"]})
