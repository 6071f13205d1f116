"""Rows of text as a table with aligned columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

__all__ = ["aligned"]


def aligned(rows: Iterable[Sequence[str]], *, to_the_right: Collection[int] = ()) -> list[str]:
    """One line a row, each column as wide as its widest cell.

    >>> aligned([("name", "n"), ("a", "10")])
    ['name  n', 'a     10']
    >>> aligned([("name", "n"), ("a", "10")], to_the_right=[1])
    ['name   n', 'a     10']
    """
    columns = []
    for k, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        justify = str.rjust if k in to_the_right else str.ljust
        columns.append([justify(cell, width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
