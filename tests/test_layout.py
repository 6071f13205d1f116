"""Layouts: letters to axes, without an array."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gcx
from gcx.layout import as_layout


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
