"""Makes `benchmarks` importable, which nobody installs; last, so that gcx may be elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True, scope="module")
def in_haste(compiled_in_haste: None) -> None:
    """A run of a few steps is compiled longer than it takes."""
