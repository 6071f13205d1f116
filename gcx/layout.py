"""Layout: which axes of a weight are fan-in, spelled in letters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["Layout", "LayoutLike", "match_layouts"]

_ELLIPSIS = "..."
_USUAL_RANKS = 9


class Layout:
    """The axes of a weight, one letter each: ``o`` output unit, ``i`` fan-in.

    Gradient Centralization averages over the ``i`` axes and keeps the ``o`` axes apart.
    At most one ``...`` stands for all axes not named, and reads as ``i``.

    Parameters
    ----------
    text : str
        For example ``"o..."`` (torch and Equinox weights), ``"...o"`` (Flax, Haiku and Keras
        kernels), ``"io..."`` (torch transposed convolutions), ``"ioo"`` (a Flax attention query),
        ``"oio"`` (stacked experts).

    Raises
    ------
    TypeError
        If `text` is not a string.
    ValueError
        If `text` holds anything but ``o``, ``i`` and one ``...``, or names no fan-in axis.

    Examples
    --------
    >>> from gcx import Layout
    >>> Layout("...o").fan_in_axes(4)
    (0, 1, 2)
    >>> Layout("io...").fan_in_axes(4)
    (0, 2, 3)
    >>> print(Layout("o..."))
    o...
    """

    __slots__ = ("_by_rank", "_head", "_is_variadic", "_tail", "_text")

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            msg = f"a layout is a string such as 'o...' or a gcx.Layout, not {type(text).__name__}"
            raise TypeError(msg)
        head, ellipsis, tail = text.partition(_ELLIPSIS)
        if set(head + tail) - {"o", "i"}:
            msg = (
                f"layout {text!r} is not valid: write one letter an axis, 'o' (output unit) or 'i' "
                "(fan-in), and at most one '...' for all the other axes"
            )
            raise ValueError(msg)
        if not ellipsis and "i" not in head:
            msg = (
                f"layout {text!r} names no fan-in axis ('i' or '...'), so there is no mean to "
                "subtract; leave such a weight out instead"
            )
            raise ValueError(msg)
        self._text = text
        self._head, self._tail, self._is_variadic = head, tail, bool(ellipsis)
        # Worked out once for the ranks there are, so that it costs nothing at every gradient.
        self._by_rank = tuple([self._axes_or_none(ndim) for ndim in range(_USUAL_RANKS)])

    def fan_in_axes(self, ndim: int) -> tuple[int, ...]:
        """Axes to average over in an array of rank `ndim`.

        Scalars have none, and vectors have none unless the layout gives a vector no output axis
        (``"i"``, ``"..."``): a bias holds one number per output unit.

        Parameters
        ----------
        ndim : int
            Rank of the gradient.

        Returns
        -------
        tuple of int
            Non-negative, in increasing order; empty if there is nothing to average over.

        Raises
        ------
        ValueError
            If the layout does not fit the rank.

        Examples
        --------
        >>> from gcx import Layout
        >>> Layout("o...").fan_in_axes(2), Layout("o...").fan_in_axes(1)
        ((1,), ())
        """
        axes = self._by_rank[ndim] if 0 <= ndim < _USUAL_RANKS else self._axes_or_none(ndim)
        if axes is None:
            named = len(self._head + self._tail)
            at_least = "at least " if self._is_variadic else ""
            msg = f"layout {self._text!r} is for arrays of rank {at_least}{named}, not {ndim}"
            raise ValueError(msg)
        return axes

    def _axes_or_none(self, ndim: int) -> tuple[int, ...] | None:
        if ndim == 0 or (ndim == 1 and "o" in self._text):
            return ()
        unnamed = ndim - len(self._head + self._tail)
        if unnamed < 0 or (unnamed > 0 and not self._is_variadic):
            return None
        letters = self._head + "i" * unnamed + self._tail
        return tuple([k for k, letter in enumerate(letters) if letter == "i"])

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Layout({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._text == other._text

    def __hash__(self) -> int:
        return hash((Layout, self._text))

    def __reduce__(self) -> tuple[type[Layout], tuple[str]]:
        return Layout, (self._text,)


LayoutLike = Layout | str


# Parsed once for each text, of which a program has a handful.
_parsed: dict[str, Layout] = {}


def as_layout(layout: LayoutLike) -> Layout:
    """Parse text; hand a `Layout` back as it is."""
    if isinstance(layout, Layout):
        return layout
    try:
        return _parsed[layout]
    except (KeyError, TypeError):  # TypeError: not even hashable, as Layout will say
        return _parsed.setdefault(layout, Layout(layout))


def match_layouts(
    layouts: Mapping[str, LayoutLike | None], names: Iterable[str], *, complete: bool = True
) -> dict[str, Layout | None]:
    """Give each name the layout of the first key that matches it.

    Parameters
    ----------
    layouts : mapping from str to Layout, str or None
        A key is a name or a glob (``"*/kernel"``, where ``*`` also crosses ``/``). None means
        leave alone.
    names : iterable of str
        The parameters there are.
    complete : bool, optional
        If True, a key that matches no name is an error. Switch off where part of the parameters
        is hidden from view.

    Returns
    -------
    dict from str to Layout or None
        One entry for each name that some key matches, in the order of `names`.

    Raises
    ------
    TypeError
        If a key is not a string.
    ValueError
        If a key matches no name.
    """
    from gcx._globs import first_keys

    keys = first_keys(layouts, names, what="layouts", complete=complete)
    parsed = {key: None if v is None else as_layout(v) for key, v in layouts.items()}
    return {name: parsed[key] for name, key in keys.items()}
