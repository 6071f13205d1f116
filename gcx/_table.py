"""Tables of text, with aligned columns or in HTML."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape


def aligned(rows: Iterable[Sequence[str]], *, to_the_right: Collection[int] = ()) -> list[str]:
    """Make one line a row; each column is as wide as its widest cell.

    >>> aligned([("name", "n"), ("a", "10")], to_the_right=[1])
    ['name   n', 'a     10']
    """
    columns = []
    for k, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        justify = str.rjust if k in to_the_right else str.ljust
        columns.append([justify(cell, width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
