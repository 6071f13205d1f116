"""The canonical order of summation, which gives the same bits in every library.

The sum over a fan-in, in the order of its axes, is that of a halving tree: padded with -0.0 (which
changes no sum, not even that of zeros) to a power of two, the second half is added to the first
until one element is left. A fan-in longer than `SEGMENT` is cut into segments of that length, the
last of which may be shorter; each is summed by such a tree, and the sums are added up from left to
right. float16 and bfloat16 are summed in float32, wider numbers in their own precision. The mean is
the sum divided by the number of elements, rounded as IEEE 754 says; then it is multiplied by the
strength, rounded again, and subtracted, and the difference is rounded to the dtype of the array.
"""

from __future__ import annotations

SEGMENT = 1 << 14
