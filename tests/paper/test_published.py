"""The supplement's figures, read back against the rows of its tables."""

from __future__ import annotations

from itertools import chain

from benchmarks.paper.published import TABLE_1, TABLE_2

# Mean and deviation in hundredths of a point, column by column, as the rows of the supplement run.
WITHOUT_1 = "7162 31 7391 35 7557 33 7823 42 7743 30"
WITH_1 = "7283 29 7656 31 7762 37 7914 33 7810 36"
WITHOUT_2 = "7681 27 7823 42 7653 32 7388 46 7164 56 7063 44"
WITH_2 = "7812 33 7914 33 7771 35 7432 55 7280 62 7122 49"


def row(figures, name):
    spreads = (getattr(each, name) for each in figures)
    return [round(100 * value) for value in chain(*((s.mean, s.sd) for s in spreads))]


def test_every_digit():
    for table, without_gc, with_gc in ((TABLE_1, WITHOUT_1, WITH_1), (TABLE_2, WITHOUT_2, WITH_2)):
        assert row(table.values(), "without_gc") == [*map(int, without_gc.split())]
        assert row(table.values(), "with_gc") == [*map(int, with_gc.split())]


def test_the_columns():
    assert [f"{decay:g}" for decay in TABLE_1] == ["0", "0.0001", "0.0002", "0.0005", "0.001"]
    assert list(TABLE_2) == [
        *(("SGDM", rate) for rate in (0.05, 0.1, 0.2)),
        *(("Adam", rate) for rate in (0.0005, 0.001, 0.0015)),
    ]
    assert TABLE_1[5e-4] == TABLE_2["SGDM", 0.1]  # the same training


def test_one_figure_is_printed_bold_though_it_is_the_lower_one():
    both = [key for key, figures in (TABLE_1 | TABLE_2).items() if figures.both_bold]
    assert both == [("Adam", 0.0015)]
    assert all(
        f.with_gc.mean > f.without_gc.mean for f in chain(TABLE_1.values(), TABLE_2.values())
    )
