"""Colors of all pictures, and how they are saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.paper.cells import BASE

__all__ = ["ARM_COLORS", "BLUE", "GRAY", "MORE_COLORS", "VERMILION", "marked", "save"]

# Told apart by people who do not see red and green, too (the palette of Okabe and Ito).
BLUE, VERMILION, GRAY = "#0072B2", "#D55E00", "dimgray"
ARM_COLORS = {BASE: VERMILION, "gradient": BLUE}
MORE_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_MARK = ContextVar("_MARK", default="")


@contextmanager
def marked(words: str) -> Iterator[None]:
    """Write these words across each picture that is saved meanwhile."""
    token = _MARK.set(words)
    try:
        yield
    finally:
        _MARK.reset(token)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG or a PNG, by how the path ends; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_svg = path.suffix == ".svg"
    if words := _MARK.get():
        figure.text(
            *(0.5, 0.5, words),
            color=VERMILION,
            fontsize="x-large",
            ha="center",
            va="center",
            rotation=30,
            alpha=0.4,
        )
    # Ids that are no random numbers, and words as words: outlines take ten times the bytes.
    with rc_context({"svg.hashsalt": "gcx", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)
    if is_svg:
        drawn = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"<[^>]+>", _shorten, drawn), encoding="utf-8")


def _shorten(tag: re.Match[str]) -> str:
    """Leave hundredths of a point in a tag; words are outside of it."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])
