"""The same bits as in the canonical order, whatever the shape and the place in memory.

``python -m benchmarks.gpu.bits DEVICE`` looks at a few gradients, for slow inspectors.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from math import nan
from typing import Any

import numpy as np
import torch

import gcx
from benchmarks.agreement.canonical import DTYPES
from benchmarks.agreement.formats import FORMATS, Format
from benchmarks.gpu.cases import FAN_INS, Subject, subjects
from benchmarks.gpu.device import Gpu, kernels_alone
from benchmarks.gpu.report import Measured
from gcx.backends import load
from gcx.backends.cuda.tables import find_walk

__all__ = ["bits_of", "count_differing", "main", "of_cupy", "of_repeats", "of_torch"]

_REPEATS = 50
_FEW = (9, 144, 4608)  # fan-ins


_WAYS = ("new arrays", "in place", "over NaN")  # where the results are


def of_torch(gpu: Gpu) -> Iterator[Measured]:
    """Centralize the gradients of a dtype in two calls, in torch."""
    return bits_of("torch", gpu.device, _fan_ins(gpu))


def of_cupy(gpu: Gpu) -> Iterator[Measured]:
    """Centralize the gradients of a dtype in two calls, in CuPy."""
    return bits_of("cupy", gpu.device, _fan_ins(gpu))


def of_repeats(gpu: Gpu) -> Iterator[Measured]:
    """Make the same call over and over."""
    for kind in _formats():
        found = [s for fan_in in _fan_ins(gpu) for s in subjects(kind, fan_in)]
        grads, layouts = _arrays("torch", gpu.device, kind, found), _layouts(found)
        first = gcx.centralize_many(grads, layouts=layouts)
        count = 0
        for _ in range(_REPEATS):
            again = gcx.centralize_many(grads, layouts=layouts)
            count += sum(not _same(*pair) for pair in zip(first, again, strict=True))
        what = f"torch, {kind.name}: of {len(grads)} gradients, {_REPEATS} times"
        yield Measured(what, count, 0, "differ")


def count_differing(found: Any, expected: Any) -> int:
    """Count the elements that differ in a bit; one NaN is as good as another."""
    same = (found == expected) & (np.signbit(found) == np.signbit(expected))
    return int(np.sum(~(same | (np.isnan(found) & np.isnan(expected)))))


def bits_of(
    library: str,
    device: str,
    fan_ins: Sequence[int],
    *,
    dtypes: Collection[str] = DTYPES,
    ways: Collection[str] = _WAYS,
) -> Iterator[Measured]:
    """Gradients of these fan-ins, in every kind of numbers and place in memory.

    Those that the kernels read and write in 16 bytes at a time are in a list of their own.
    """
    to_numpy = load(library).to_numpy
    for kind in _formats(dtypes):
        found = [subject for fan_in in fan_ins for subject in subjects(kind, fan_in)]
        lists: dict[str, list[Subject]] = {"16 bytes at a time": [], "elementwise": []}
        for subject, array in zip(found, _arrays(library, device, kind, found), strict=True):
            lists["16 bytes at a time" if _is_packed(array, subject) else "elementwise"] += [
                subject
            ]
        for way, (access, each) in product(ways, lists.items()):
            grads, layouts = _arrays(library, device, kind, each), _layouts(each)
            out = grads if way == "in place" else None
            if way == "over NaN":
                out = _arrays(library, device, kind, each, of_nan=True)
            results = gcx.centralize_many(grads, layouts=layouts, out=out, reproducible=True)
            pairs = zip(results, each, strict=True)
            count = sum(count_differing(to_numpy(r), s.expected) for r, s in pairs) if each else nan
            what = f"{library}, {kind.name}, {way}, {access}"
            yield Measured(f"{what}: elements of {len(each)} gradients", count, 0, "differ")


def _is_packed(array: Any, subject: Subject) -> bool:
    """Return True if the kernels move 16 bytes of an array at a time."""
    if isinstance(array, torch.Tensor):
        start, steps = array.data_ptr(), array.stride()
    else:
        start, steps = array.data.ptr, tuple(s // array.itemsize for s in array.strides)
    walk = find_walk(tuple(array.shape), steps, subject.case.fan_in, any_order=False)
    if walk is None:
        return False
    lengths = [
        (m.offset, m.step, m.fan_in if walk.kind == "rows" else m.units) for m in walk.matrices
    ]
    return start % 16 == 0 and all(n * array.itemsize % 16 == 0 for three in lengths for n in three)


def _formats(dtypes: Collection[str] = DTYPES) -> list[Format]:
    return [kind for kind in FORMATS if kind.name in dtypes]


def _fan_ins(gpu: Gpu) -> Sequence[int]:
    return FAN_INS[:4] if gpu.is_brief else FAN_INS


def _arrays(
    library: str, device: str, kind: Format, found: Sequence[Subject], *, of_nan: bool = False
) -> list[Any]:
    backend = load(library)

    def make(values: Any) -> Any:  # from a copy, as torch may share its memory
        copied = np.full_like(values, nan) if of_nan else values.copy()
        return backend.asarray(copied, kind.name, device)

    return [subject.sample.lay_out(subject.sample.values, make) for subject in found]


def _layouts(found: Sequence[Subject]) -> list[str]:
    return [subject.case.layout for subject in found]


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = _INTEGERS[one.itemsize]
    return torch.equal(one.view(kind), other.view(kind))


def main() -> int:
    """Run as a program; the exit code is 0 if all bits are right."""
    device, dtypes = sys.argv[1], ("float32", "bfloat16")
    # A CPU, as in tests, has no kernels.
    with kernels_alone("torch", device) if device != "cpu" else nullcontext():
        found = [*bits_of("torch", device, _FEW, dtypes=dtypes, ways=("in place",))]
    return 0 if all(measured.ok for measured in found) else 1


if __name__ == "__main__":
    sys.exit(main())
