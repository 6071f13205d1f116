"""Plans: sequences of rows that print as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from html import unescape

import pytest

from gcx import Layout
from gcx.plan import Plan, PlanRow

ROWS = [
    PlanRow("conv.weight", (8, 3, 3, 3), Layout("o..."), "Conv2d"),
    PlanRow("conv.bias", (8,), None, "bias"),
    PlanRow("temperature", (), None, "no layer gcx knows"),
]


# A transformer of 12 blocks in small: 63 rows.
LONG = [
    PlanRow("embed.weight", (100, 4), None, "embedding"),
    PlanRow("cls_token", (1, 4), None, "unknown: no rule"),
    *(
        row
        for k in range(12)
        for row in (
            PlanRow(f"blocks.{k}.norm1.weight", (4,), None, "norm"),
            PlanRow(f"blocks.{k}.q.weight", (4, 4), Layout("o..."), "Linear"),
            PlanRow(f"blocks.{k}.k.weight", (4, 4), Layout("o..."), "Linear"),
            PlanRow(f"blocks.{k}.up1.w", (8, 4), Layout("o..."), "Linear"),
            PlanRow(f"blocks.{k}.up2.w", (4, 8), Layout("o..."), "Linear"),
        )
    ),
    PlanRow("head.weight", (4, 4), Layout("io"), "Linear"),
]


PLAN, LONG_PLAN = Plan(iter(ROWS)), Plan(LONG)


def test_is_a_sequence_of_rows_and_a_value() -> None:
    assert isinstance(PLAN, Sequence)
    assert (len(PLAN), len(Plan([]))) == (3, 0)
    assert list(PLAN) == ROWS
    assert PLAN[-1] is ROWS[-1]
    with pytest.raises(IndexError):
        PLAN[3]
    assert PLAN[1:] == Plan(ROWS[1:])
    assert str(PLAN[:1]).endswith("1 of 1 parameters centralized")
    assert Plan(ROWS) == PLAN
    assert Plan(ROWS[:2]) != PLAN
    assert ROWS != PLAN
    assert len({PLAN, Plan(ROWS)}) == 1


def test_prints_as_a_table() -> None:
    assert str(Plan([])).splitlines()[-1] == "0 of 0 parameters centralized"
    assert str(PLAN).splitlines() == [
        "parameter    shape    layout  reason",
        "conv.weight  8x3x3x3  o...    Conv2d",
        "conv.bias    8        -       bias",
        "temperature  scalar   -       no layer gcx knows",
        "1 of 3 parameters centralized",
    ]
    assert repr(PLAN) == "<gcx plan: 1 of 3 parameters centralized>"


def test_a_long_one_prints_by_reason_and_layout() -> None:
    _, *lines, counts = LONG_PLAN.table().splitlines()
    assert [line.split()[0] for line in lines] == [row.name for row in LONG]
    assert counts == "49 of 63 parameters centralized"
    assert str(Plan(LONG[:40])) == Plan(LONG[:40]).table()
    assert str(Plan(LONG[:41])).startswith(Plan(LONG[:41]).summary())
    assert str(LONG_PLAN).splitlines() == [
        "parameters  elements  layout  reason            names",
        "         1       400  -       embedding         embed.weight",
        "         1         4  -       unknown: no rule  cls_token",
        "        12        48  -       norm              blocks.*.norm1.weight",
        "        48     1,152  o...    Linear            blocks.*.up*.w, blocks.*.q.weight, ...",
        "         1        16  io      Linear            head.weight",
        "49 of 63 parameters centralized; plan.table() shows every row",
    ]


def names_in_summary(names: Sequence[str], reason: str = "unknown") -> list[str]:
    line = Plan(PlanRow(name, (), None, reason) for name in names).summary().splitlines()[1]
    return re.split(r"\s{2,}", line.strip())[-1].split(", ")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["Dense_0/kernel", "Dense_1/kernel"], ["Dense_*/kernel"]),
        (["layers.0.weight", "layers.10.weight"], ["layers.*.weight"]),
        (["layer1.0.conv1.w", "layer2.0.conv1.w"], ["layer*.0.conv1.w"]),
        (["a.0.conv1.w", "a.0.conv2.w", "a.1.conv1.w"], ["a.*.conv*.w"]),
        (["conv1.w"], ["conv1.w"]),
        (["head.w", "a.0.w", "a.1.w"], ["a.*.w", "head.w"]),
        (["0", "1"], ["*"]),
        (["a1", "a", "a*"], ["a1", "a", "a*"]),
    ],
)
def test_names_that_differ_in_numbers_are_one(names: list[str], shown: list[str]) -> None:
    assert names_in_summary(names) == shown
    assert [n for n in names if not any(fnmatchcase(n, pattern) for pattern in shown)] == []


def test_every_unknown_name_is_in_the_summary() -> None:
    names = [f"{letter}.weight" for letter in "abcdefgh"]
    assert names_in_summary(names) == names
    assert names_in_summary(names, "bias") == ["a.weight", "b.weight", "..."]


def test_as_a_dict_it_is_json() -> None:
    layout = Layout("(bi)o...", b=2)
    grouped = PlanRow("grouped", (4, 3, 3), layout, "2 groups")
    found = Plan([*ROWS, grouped]).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert list(found) == [row.name for row in (*ROWS, grouped)]
    assert found["conv.weight"] == {"shape": [8, 3, 3, 3], "layout": "o...", "reason": "Conv2d"}
    assert found["conv.bias"]["layout"] is None
    assert Layout(found["grouped"]["layout"], **found["grouped"]["sizes"]) == layout


def test_rows_are_found_by_name() -> None:
    assert PLAN["conv.weight"] is PLAN[0]
    assert Plan([*PLAN, PLAN[0]._replace(reason="again")])["conv.weight"] is PLAN[0]
    with pytest.raises(KeyError, match=r"no row 'conv.wieght'; the nearest are 'conv.weight'"):
        PLAN["conv.wieght"]
    with pytest.raises(KeyError, match=r"are '[^,]+', '[^,]+', '[^,]+'\W$"):
        LONG_PLAN["blocks.1.norm.weight"]


@pytest.mark.parametrize("count", [1, 41])
def test_in_a_notebook_it_is_its_text_and_names_cannot_break_out_of_the_html(count: int) -> None:
    nasty = "<script>alert('&')</script>"
    plan = Plan([PlanRow(nasty, (2,), None, nasty)] * count)
    html = plan._repr_html_()
    assert "<script" not in html
    assert unescape(html) == f"<pre>{plan}</pre>"
