"""Models of two weights, and the libraries and dtypes in which they are measured."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.throughput.models import Model, Weight

from libraries import installed

SMALL = Model("small", (Weight((4, 3, 2, 2)), Weight((6, 5))), ((4,),))
TRANSPOSED = Model("transposed", (Weight((5, 6), "...o"), Weight((3, 4))), ())
LIBRARIES = [name for name in ("numpy", "torch", "jax") if installed(name)]
IN_BFLOAT16 = [name for name in LIBRARIES if name != "numpy" or find_spec("ml_dtypes")]
CHOICES = [
    *((name, "float32") for name in LIBRARIES),
    *((name, "bfloat16") for name in IN_BFLOAT16),
]
