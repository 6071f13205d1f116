"""``python -m benchmarks.gpu.small DEVICE``: a few gradients of each kind, for slow inspectors."""

from __future__ import annotations

import sys

from benchmarks.gpu.bits import bits_of

__all__: list[str] = []

_FAN_INS = (9, 147, 4608)
_DTYPES, _WAYS = ("float32", "bfloat16"), ("in place",)


def main() -> int:
    """Run as a program; the exit code says whether all bits are right."""
    found = bits_of("torch", sys.argv[1], _FAN_INS, dtypes=_DTYPES, ways=_WAYS)
    return 0 if all(measured.ok for measured in found) else 1


if __name__ == "__main__":
    sys.exit(main())
