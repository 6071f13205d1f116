"""Layouts: letters to axes, names to layouts. Neither needs an array."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gcx
from gcx._layouts import layouts_for
from gcx.layout import as_layout


def test_a_vector_that_is_a_fan_in() -> None:
    for text in ("...", "i"):
        assert gcx.Layout(text).fan_in_axes(1) == (0,)


@pytest.mark.parametrize("text", ["o...", "...o", "io...", "oi", "io", "ioo", "oio"])
@pytest.mark.parametrize("ndim", [0, 1])
def test_scalars_and_vectors_have_no_fan_in(text: str, ndim: int) -> None:
    assert gcx.Layout(text).fan_in_axes(ndim) == ()


@pytest.mark.parametrize(
    ("text", "at_start", "at_end"), [("o...", 1, 0), ("...o", 0, 1), ("...", 0, 0)]
)
def test_every_rank_counts_its_axes(text: str, at_start: int, at_end: int) -> None:
    for ndim in range(2, 33):
        axes = tuple(range(ndim))[at_start : ndim - at_end]
        assert gcx.Layout(text).fan_in_axes(ndim) == axes
    for ndim in (-1, -2, -9):
        with pytest.raises(ValueError, match=f"not {ndim}$"):
            gcx.Layout(text).fan_in_axes(ndim)


@pytest.mark.parametrize("text", ["oi", "oio", "oioi", "o" * 7 + "i", "o" * 8 + "i", "o" * 9 + "i"])
def test_letters_alone_fit_their_own_rank(text: str) -> None:
    assert gcx.Layout(text).fan_in_axes(len(text)) == tuple(
        k for k, letter in enumerate(text) if letter == "i"
    )
    for ndim in {*range(2, 12)} - {len(text)}:
        with pytest.raises(ValueError, match=f"arrays of rank {len(text)}, not {ndim}$"):
            gcx.Layout(text).fan_in_axes(ndim)


@given(
    head=st.text("oi", max_size=3),
    tail=st.text("oi", max_size=3),
    unnamed=st.none() | st.integers(0, 8),
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
    with pytest.raises(TypeError, match=f"a layout is a string.*not {type(value).__name__}"):
        gcx.Layout(value)
    with pytest.raises(TypeError, match=f"a layout is a string.*not {type(value).__name__}"):
        as_layout(value)


@pytest.mark.parametrize(
    ("text", "ndim", "message"),
    [
        ("ioo", 2, "layout 'ioo' is for arrays of rank 3, not 2"),
        ("oi", 3, "layout 'oi' is for arrays of rank 2, not 3"),
        ("i", 2, "layout 'i' is for arrays of rank 1, not 2"),
        ("ooi...", 2, "layout 'ooi...' is for arrays of rank at least 3, not 2"),
        ("oi", 12, "layout 'oi' is for arrays of rank 2, not 12"),
        ("o...", -1, "-1"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused(text: str, ndim: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gcx.Layout(text).fan_in_axes(ndim)


def test_layouts_are_values() -> None:
    layout = gcx.Layout("io...")
    assert str(layout) == "io..."
    assert repr(layout) == "Layout('io...')"
    assert layout == gcx.Layout("io...")
    assert layout != gcx.Layout("oi...")
    assert layout != "io..."
    assert len({layout, gcx.Layout("io..."), gcx.Layout("...o")}) == 2
    assert as_layout(layout) is layout


NAMES = ["encoder/0/kernel", "encoder/0/bias", "head/kernel", "w[0]"]


def find(layouts: Any, names: Sequence[str] = NAMES) -> list[gcx.Layout | None]:
    return layouts_for([(name, None) for name in names], layouts, like=None)


def matched(layouts: dict[str, object]) -> dict[str, str]:
    found = zip(NAMES, find({**layouts, "?*": None}), strict=True)
    return {name: str(layout) for name, layout in found if layout is not None}


def test_keys_are_names_or_globs() -> None:
    assert matched({"head/kernel": "...o"}) == {"head/kernel": "...o"}
    assert matched({"*/kernel": "...o"}) == {"encoder/0/kernel": "...o", "head/kernel": "...o"}
    assert matched({"encoder/?/b*": gcx.Layout("i")}) == {"encoder/0/bias": "i"}
    assert matched({"w[0]": "o..."}) == {"w[0]": "o..."}, "a name is a name, brackets or not"


def test_the_first_key_that_matches_counts() -> None:
    assert matched({"head/*": None, "*": "o..."}) == {
        "encoder/0/kernel": "o...",
        "encoder/0/bias": "o...",
        "w[0]": "o...",
    }
    assert matched({"*": "o...", "head/*": None})["head/kernel"] == "o..."


def test_a_key_is_text() -> None:
    with pytest.raises(TypeError, match="a key is the name of a parameter or a glob, not 0"):
        find({0: "o..."}, ["0"])


def test_a_key_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'heads/\*' matches no parameter.*encoder/0/kernel"):
        find({"*": "o...", "heads/*": None})
    with pytest.raises(ValueError, match=r"'\*' matches no parameter.*\(none\)"):
        find({"*": "o..."}, [])


def test_a_long_list_of_names_is_cut_short() -> None:
    names = [f"layer{k}" for k in range(1000)]
    with pytest.raises(ValueError, match=r"layer9, \.\.\.$"):
        find({"absent": None}, names)


def test_a_layout_that_is_not_valid_is_an_error_even_if_nothing_uses_it() -> None:
    with pytest.raises(ValueError, match="layout 'xyz' is not valid"):
        find({"*": "o...", "w*": "xyz"})
