"""Layout: the axes of a weight in letters, fan-in and output units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import prod
from operator import index

__all__ = ["Layout", "LayoutLike"]

_ELLIPSIS = "..."
_AXIS = re.compile(r"\.\.\.|[oib]|\((?:\.\.\.|[oib])+\)")
_USUAL_RANKS = 9

Shape = tuple[int, ...]


class Layout:
    """The axes of a weight, one letter each.

    ``o`` is an output unit, ``i`` the fan-in, and ``b`` a stack of layers, such as experts or
    scanned layers. At most one ``...`` stands for all other axes, as fan-in. Means are over the
    fan-in, for each entry of ``o`` and ``b``. Parentheses split one axis into parts, the outermost
    first, as in einops; the sizes of all parts but one are keywords.

    Parameters
    ----------
    text : str
        ``"o..."`` for torch and Equinox weights, ``"...o"`` for Flax, Haiku and Keras kernels.
        ``"io..."`` is a torch transposed convolution; with groups it is ``"(bi)o..."``.
        ``"ioo"`` is a Flax attention query, ``"bio"`` a stack of experts.
    **sizes : int
        Sizes of parts, such as ``b=4`` for four groups.

    Raises
    ------
    TypeError, ValueError
        If `text` is not such a string, has no fan-in axis, or the sizes do not settle its parts.

    Examples
    --------
    >>> from gcx import Layout
    >>> Layout("...o").fan_in_axes(4)
    (0, 1, 2)
    >>> Layout("io...").fan_in_axes(4)
    (0, 2, 3)
    >>> Layout("(bi)o...", b=2).split((8, 4, 3, 3))
    ((2, 4, 4, 3, 3), (1, 3, 4))
    """

    def __init__(self, text: str, **sizes: int) -> None:
        if not isinstance(text, str):
            raise TypeError(
                f"a layout is a string such as 'o...' or a gcx.Layout, not {type(text).__name__}"
            )
        axes = _AXIS.findall(text)
        is_known = "".join(axes) == text and text.count(_ELLIPSIS) < 2
        if not is_known or any(a[0] == "(" and len({*_list_parts(a)}) < 2 for a in axes):
            raise ValueError(
                f"layout {text!r} is not valid: write one letter an axis, 'o' (output unit), 'i' "
                "(fan-in) or 'b' (stack), at most one '...' for all the other axes, and "
                f"parentheses around two or more parts of an axis{_hint(text)}"
            )
        if "i" not in text and _ELLIPSIS not in text:
            raise ValueError(
                f"layout {text!r} names no fan-in axis ('i' or '...'): leave such a weight out"
            )
        self._text = text
        self._sizes = _check_sizes(text, axes, sizes)
        self.is_split: bool = "(" in text
        self._is_variadic = _ELLIPSIS in axes
        place = axes.index(_ELLIPSIS) if self._is_variadic else len(axes)
        parts = [*map(_list_parts, axes)]
        self._head, self._tail = parts[:place], parts[place + 1 :]
        # For the usual ranks, since each call of `centralize` needs them.
        self._by_rank: dict[int, tuple[int, ...]] = {}
        for ndim in range(_USUAL_RANKS):
            with suppress(ValueError):
                self._by_rank[ndim] = self._find_axes(ndim)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the parts in parentheses, by letter; empty if there are none."""
        return dict(self._sizes)

    def fan_in_axes(self, ndim: int) -> tuple[int, ...]:
        """Find the axes to average over in an array of rank `ndim`, in increasing order.

        Scalars have none. Vectors have none if the layout has an ``o`` or ``b``: a bias holds one
        number per output unit. Raises a ValueError if the layout does not fit the rank, or splits
        an axis (then use `split`).

        >>> Layout("o...").fan_in_axes(2), Layout("o...").fan_in_axes(1)
        ((1,), ())
        """
        if self.is_split:
            raise ValueError(f"{self!r} splits an axis of the array; use split(shape)")
        return self._by_rank[ndim] if ndim in self._by_rank else self._find_axes(ndim)

    def split(self, shape: Iterable[int]) -> tuple[Shape, tuple[int, ...]]:
        """Return the shape with one axis for each letter, and the fan-in axes of that shape.

        Raises a ValueError if the layout does not fit the shape.

        >>> Layout("b(oi...)", o=4).split((3, 24))
        ((3, 4, 6), (2,))
        """
        shape = tuple(shape)
        if not self.is_split:
            return shape, self.fan_in_axes(len(shape))
        axes = self._find_axes(len(shape))
        if len(shape) < min(2, len(self._head) + len(self._tail)):  # a bias
            return shape, axes
        each = zip(self._list_axes(len(shape)), shape, strict=True)
        sizes = [part for axis, size in each for part in self._split_axis(axis, size, shape)]
        return tuple(sizes), axes

    def letters(self, ndim: int) -> str:
        """Write one letter for each axis of `split`, for an array of rank `ndim` that it fits.

        >>> Layout("o...").letters(4), Layout("(bi)o...", b=2).letters(4)
        ('oiii', 'bioii')
        """
        return "".join(part for axis in self._list_axes(ndim) for part in axis)

    def _find_axes(self, ndim: int) -> tuple[int, ...]:
        """Find the axes of `split` that are fan-in."""
        is_bias = ndim == 1 < len(self._head) + len(self._tail) and re.search("[ob]", self._text)
        letters = "" if ndim == 0 or is_bias else self.letters(ndim)
        return tuple([k for k, letter in enumerate(letters) if letter == "i"])

    def _list_axes(self, ndim: int) -> list[list[str]]:
        named = len(self._head) + len(self._tail)
        if ndim < named or (ndim > named and not self._is_variadic):
            at_least = "at least " if self._is_variadic else ""
            raise ValueError(
                f"layout {self._text!r} is for arrays of rank {at_least}{named}, not {ndim}"
            )
        return [*self._head, *[["i"]] * (ndim - named), *self._tail]

    def _split_axis(self, axis: list[str], size: int, shape: Shape) -> list[int]:
        if len(axis) == 1:
            return [size]
        sizes = [self._sizes.get(part, 0) for part in axis]
        known = prod([given for given in sizes if given])
        if size % known or (0 not in sizes and size != known):
            wrong = "divisible by" if 0 in sizes else "equal to"
            raise ValueError(f"{self!r} does not fit shape {shape}: {size} is not {wrong} {known}")
        return [given or size // known for given in sizes]

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        sizes = "".join(f", {letter}={size}" for letter, size in self._sizes.items())
        return f"Layout({self._text!r}{sizes})"

    def __eq__(self, other: object) -> bool:
        mine = self._text, self._sizes
        return isinstance(other, Layout) and mine == (other._text, other._sizes)

    def __hash__(self) -> int:
        return hash((Layout, self._text, *sorted(self._sizes.items())))


LayoutLike = Layout | str


def _hint(text: str) -> str:
    """Translate the names of axes that other libraries use."""
    here = re.sub("[dhw0-9]+", _ELLIPSIS, text.lower())
    is_clear = sorted(here.replace(_ELLIPSIS, "")) == ["i", "o"] and here.count(_ELLIPSIS) < 2
    return f"; {text!r} is {here!r} here" if is_clear else ""


def _list_parts(axis: str) -> list[str]:
    """List the letters of the parts of an axis; fan-in neighbours are one part."""
    return [*re.sub("i+", "i", axis.strip("()").replace(_ELLIPSIS, "i"))]


def _check_sizes(text: str, axes: Iterable[str], sizes: Mapping[str, int]) -> dict[str, int]:
    split = [part for axis in axes if axis[0] == "(" for part in _list_parts(axis)]
    for letter, size in sizes.items():
        if split.count(letter) != 1:
            found = f"{'several parts' if letter in split else 'no part'} {letter!r} in parentheses"
            raise ValueError(f"{letter}={size!r} has no meaning: layout {text!r} has {found}")
        if not hasattr(size, "__index__") or isinstance(size, bool):
            raise TypeError(f"layout {text!r}: the size of {letter!r} is an integer, not {size!r}")
        if size < 1:
            raise ValueError(f"layout {text!r}: the size of {letter!r} is at least 1, not {size}")
    for axis in axes:
        unknown = [part for part in _list_parts(axis) if part not in sizes]
        if axis[0] == "(" and len(unknown) > 1:
            raise ValueError(
                f"layout {text!r} splits the axis {axis}: give the size of all parts but one, "
                f"such as Layout({text!r}, {unknown[0]}=2)"
            )
    return {letter: index(size) for letter, size in sorted(sizes.items())}


# Each text is parsed once; a program has a handful.
_parsed: dict[str, Layout] = {}


def as_layout(layout: LayoutLike) -> Layout:
    if isinstance(layout, Layout):
        return layout
    try:
        return _parsed[layout]
    except (KeyError, TypeError):  # TypeError: unhashable, and Layout raises the right error
        return _parsed.setdefault(layout, Layout(layout))
