"""Tables and numbers as Markdown shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.paper.statistics import Paired, Spread

__all__ = ["interval", "p_value", "spread", "table", "text"]


def text(*lines: str) -> str:
    """Join lines; the last one ends as well."""
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Give the lines of a table."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def spread(values: Spread) -> str:
    """Write a mean and its standard deviation."""
    return f"{values.mean:.2f} ± {values.sd:.2f}"


def interval(paired: Paired) -> str:
    """Write a difference and its interval."""
    return f"{_signed(paired.difference)} [{_signed(paired.low)}, {_signed(paired.high)}]"


def p_value(value: float) -> str:
    """Write the p of a test."""
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}"  # never -0.00
