"""gcx.optax and layers: what needs no framework of layers."""

from __future__ import annotations

from typing import Any

import pytest

from gcx import Layout
from gcx.layout import as_layout
from gcx.optax._models._parameters import SingleLayer, decide_in_stack
from gcx.optax._models.flax import einsum_layout
from gcx.plan import LeaveAlone, PlanRow

pytestmark = pytest.mark.one_framework

# Answer for one layer and its shape, if that is known; shape of what the optimizer has; its layout.
STACKS: list[tuple[Any, Any, tuple[int, ...], Any]] = [
    ("io", (5, 4), (5, 4), "io"),
    ("io", (5, 4), (3, 5, 4), "bio"),
    ("io", (5, 4), (3, 2, 5, 4), "bbio"),
    ("io", (5, 4), (5, 3, 4), "ibo"),  # scanned over axis 1
    ("io", (5, 4), (5, 4, 3), "iob"),
    ("io", (5, 4), (5, 3, 2, 4), "ibbo"),
    ("io", (5, 5), (5, 5, 5), "bio"),  # all axes fit: it is the one in front
    ("...o", (3, 3, 2, 4), (7, 3, 3, 2, 4), "biiio"),
    ("...oi", (3, 4, 2), (3, 7, 4, 2), "iboi"),
    ("o...", (4, 2, 3), (7, 4, 2, 3), "boii"),
    ("bio", (2, 5, 4), (3, 2, 5, 4), "bbio"),  # a batch of kernels, scanned
    ("io", None, (2, 2), "io"),
    ("io", None, (2, 2, 2, 2), "bbio"),
    ("...o", None, (2, 2, 2, 2), "...o"),
    (Layout("(bi)o", b=2), None, (4, 6), Layout("(bi)o", b=2)),
]


@pytest.mark.parametrize(("answer", "own", "shape", "layout"), STACKS)
def test_axes_of_a_stack_are_kept_wherever_they_are(
    answer: Any, own: Any, shape: tuple[int, ...], layout: Any
) -> None:
    expected = PlanRow("w", shape, as_layout(layout), "Dense")
    assert decide_in_stack("w", shape, answer, "Dense", own) == expected
    if own is not None:
        assert decide_in_stack("w", shape, SingleLayer(answer, own), "Dense") == expected


UNKNOWN = LeaveAlone("unknown: nobody declared Dense.w")


@pytest.mark.parametrize(
    ("answer", "own", "shape", "reason"),
    [
        *[
            ("io", (5, 4), shape, f"unknown: the shape is {shape}, but a Dense has (5, 4)")
            for shape in ((4, 5), (20,), (3, 4, 5))
        ],
        (LeaveAlone("token"), None, (2, 3), "token"),
        (None, None, (2, 3), "left alone by the rule of Dense"),
        (UNKNOWN, None, (4,), "a vector has no fan-in"),
        (UNKNOWN, (4,), (3, 4), "a vector has no fan-in"),  # in a stack
        (UNKNOWN, (), (3,), "a scalar has no fan-in"),
        (UNKNOWN, None, (3, 4), UNKNOWN.reason),
    ],
)
def test_reasons_to_leave_alone(answer: Any, own: Any, shape: Any, reason: str) -> None:
    assert decide_in_stack("w", shape, answer, "Dense", own) == PlanRow("w", shape, None, reason)


EINSUMS = {
    "bi,io->bo": "io",
    "b i, i o -> b o": "io",
    "bei,eio->beo": "bio",
    "...d,dhk->...hk": "ioo",
    "bhk,hkd->bd": "iio",
    "bd,d->bd": LeaveAlone("no fan-in: nothing is summed over"),
    "...d,d...->...": LeaveAlone("unknown: an ellipsis in the kernel of an einsum"),
    None: LeaveAlone("unknown: the einsum string came with the call"),
}


@pytest.mark.parametrize(("subscripts", "expected"), EINSUMS.items())
def test_fan_in_of_an_einsum_is_what_it_sums_over(subscripts: Any, expected: Any) -> None:
    assert einsum_layout(subscripts) == expected
