"""The canonical order of the tests is the documented one."""

from __future__ import annotations

import numpy as np
import pytest

import canonical_order
from canonical_order import SEGMENT
from same_bits import assert_same_bits


def test_canonical_order_is_that_of_the_documentation() -> None:
    one, tiny = np.float32(1), np.float32(2**-25)
    halves = np.array([one, tiny, -one, tiny])
    assert canonical_order.canonical_sum(halves) == 2 * tiny  # (1 - 1) + (tiny + tiny)
    assert sum(halves, start=np.float32(0)) == tiny  # ((1 + tiny) - 1) + tiny

    # Of three elements, padded to four, the last is the partner of the first.
    assert canonical_order.canonical_sum(np.array([one, tiny, -one])) == tiny

    # What is small is lost against the first segment, and not gathered from the others before.
    segments = np.zeros(3 * SEGMENT, np.float32)
    segments[::SEGMENT] = one, tiny, tiny
    assert canonical_order.canonical_sum(segments) == one


def test_bfloat16_is_rounded_as_by_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    x = np.ldexp(rng.normal(size=100_000), rng.integers(-140, 120, 100_000)).astype("float32")
    x = np.append(x, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38], "float32"))
    narrow = x.astype(ml_dtypes.bfloat16).astype("float32")
    assert_same_bits(canonical_order.rounded(x, "bfloat16"), narrow)
