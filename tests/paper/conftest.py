"""Makes `benchmarks` importable, which nobody installs; last, so that gcx may be elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
