"""Floating formats as rounding sees them: how fine their numbers lie, and how to reach them.

Written in float64 alone, so that what it says of bfloat16 or float8 is independent of the libraries
under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True)
class Format:
    """One dtype, and how far from the exact answer it may be."""

    name: str
    bits: int  # of the significand, with the hidden one
    smallest: float  # distance of the numbers next to zero
    limit: float  # largest error, in ulp of the largest magnitude in the output unit

    @property
    def apart(self) -> float:
        """Largest difference between two libraries, each within the limit, in the same ulp."""
        return 2 * self.limit

    @property
    def is_complex(self) -> bool:
        """Whether an element is a pair of such numbers."""
        return self.name.startswith("complex")

    def ulp(self, magnitude: Any) -> Any:
        """Distance between neighbouring numbers of this format at `magnitude`."""
        _, exponent = np.frexp(magnitude)
        return np.maximum(np.ldexp(1.0, exponent - self.bits), self.smallest)

    def round(self, values: Any) -> Any:
        """Round to the nearest numbers of this format, still as float64 or complex128."""
        if np.iscomplexobj(values):
            return self.round(values.real) + 1j * self.round(values.imag)
        step = self.ulp(np.abs(values))
        return np.rint(values / step) * step


# Narrow formats are computed in float32 and rounded once: half an ulp, and a little for the error
# of float32.
_ONE_ROUNDING = 0.51
# What gcx promises of float32. In wider formats sums are left to the library, and the longest
# gradients here have 9001 elements to add up.
_PROMISED, _LEFT_TO_THE_LIBRARY = 4.0, 16.0

FORMATS = (
    Format("float64", 53, 2.0**-1074, _LEFT_TO_THE_LIBRARY),
    Format("float32", 24, 2.0**-149, _PROMISED),
    Format("float16", 11, 2.0**-24, _ONE_ROUNDING),
    Format("bfloat16", 8, 2.0**-133, _ONE_ROUNDING),
    Format("float8_e4m3fn", 4, 2.0**-9, _ONE_ROUNDING),
    Format("complex64", 24, 2.0**-149, _LEFT_TO_THE_LIBRARY),
)
