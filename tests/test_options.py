"""Options that every adapter passes on: checked where the user gives them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from gcx._options import Options


def test_defaults() -> None:
    options = Options()
    assert (options.where, options.decay, options.strength) == ("gradient", None, 1.0)
    assert (options.layers, options.overrides, options.reproducible) == ("all", None, False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"where": "updates"}, ValueError, "where is one of 'gradient', 'update', not 'updates'"),
        ({"decay": "in"}, ValueError, "decay is one of None, 'inside', 'outside', not 'in'"),
        ({"layers": "linear"}, ValueError, "layers is one of 'all', 'conv', not 'linear'"),
        ({"strength": 2}, ValueError, "strength is the part of the mean to subtract, from 0 to 1"),
        ({"strength": "1"}, ValueError, "strength is the part of the mean to subtract"),
        ({"overrides": "conv"}, TypeError, "overrides is a mapping from names to layouts"),
        ({"overrides": {"a.*": "ox"}}, ValueError, r"overrides: a\.\*: layout 'ox' is not valid"),
        ({"overrides": {"a": "(bi)o"}}, ValueError, "overrides: a: .*give the size of all parts"),
        ({"reproducible": "no"}, ValueError, "reproducible is one of True, False, not 'no'"),
        ({"wher": "update"}, TypeError, "wher"),
    ],
)
def test_error_at_construction(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Options(**given)


def test_strength_is_a_float() -> None:
    assert type(Options(strength=1).strength) is float


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().where = "update"  # type: ignore[misc]
