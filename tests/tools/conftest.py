"""Makes `benchmarks` importable, which nobody installs; last, so that gcx may be elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS.parent), str(TESTS / "around_torch")]
