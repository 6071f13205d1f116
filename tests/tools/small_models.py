"""Models of two weights, for tests that measure."""

from __future__ import annotations

from benchmarks.throughput.models import Model, Weight

SMALL = Model("small", (Weight((4, 3, 2, 2)), Weight((6, 5))), ((4,),))
TRANSPOSED = Model("transposed", (Weight((5, 6), "...o"), Weight((3, 4))), ())
