"""The same bits as in the canonical order, whatever the shape and the place in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch

import gcx
from benchmarks.agreement.canonical import DTYPES
from benchmarks.agreement.formats import FORMATS, Format
from benchmarks.gpu.cases import FAN_INS, Subject, subjects
from benchmarks.gpu.device import Gpu
from benchmarks.gpu.report import Measured
from gcx.backends import load

__all__ = ["bits_of", "differing", "of_cupy", "of_repeats", "of_torch"]

_REPEATS = 50


def _into_new(grads: list[Any], layouts: list[str]) -> list[Any]:
    return gcx.centralize_many(grads, layouts=layouts, reproducible=True)


def _in_place(grads: list[Any], layouts: list[str]) -> list[Any]:
    return gcx.centralize_many(grads, layouts=layouts, out=grads, reproducible=True)


def _into_poisoned(grads: list[Any], layouts: list[str]) -> list[Any]:
    out = [grad * float("nan") for grad in grads]
    return gcx.centralize_many(grads, layouts=layouts, out=out, reproducible=True)


_WAYS: dict[str, Callable[[list[Any], list[str]], list[Any]]] = {
    "new arrays": _into_new,
    "in place": _in_place,
    "over NaN": _into_poisoned,
}


def of_torch(gpu: Gpu) -> Iterator[Measured]:
    """All gradients of a dtype in one call, in torch."""
    return bits_of("torch", gpu.device, _fan_ins(gpu))


def of_cupy(gpu: Gpu) -> Iterator[Measured]:
    """All gradients of a dtype in one call, in CuPy."""
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


def differing(found: Any, expected: Any) -> int:
    """Count the elements that differ in a bit; one NaN is as good as another."""
    same = (found == expected) & (np.signbit(found) == np.signbit(expected))
    return int(np.sum(~(same | (np.isnan(found) & np.isnan(expected)))))


def bits_of(
    library: str,
    device: str,
    fan_ins: Sequence[int],
    *,
    dtypes: Collection[str] = DTYPES,
    ways: Collection[str] = tuple(_WAYS),
) -> Iterator[Measured]:
    """Gradients of these fan-ins, in every kind of numbers and place in memory."""
    for kind in _formats(dtypes):
        found = [subject for fan_in in fan_ins for subject in subjects(kind, fan_in)]
        for way in ways:
            grads = _arrays(library, device, kind, found)
            results = _WAYS[way](grads, _layouts(found))
            to_numpy = load(library).to_numpy
            pairs = zip(results, found, strict=True)
            count = sum(differing(to_numpy(r), s.expected) for r, s in pairs)
            what = f"{library}, {kind.name}, {way}: elements of {len(grads)} gradients"
            yield Measured(what, count, 0, "differ")


def _formats(dtypes: Collection[str] = DTYPES) -> list[Format]:
    return [kind for kind in FORMATS if kind.name in dtypes]


def _fan_ins(gpu: Gpu) -> Sequence[int]:
    return FAN_INS[:4] if gpu.is_brief else FAN_INS


def _arrays(library: str, device: str, kind: Format, found: Sequence[Subject]) -> list[Any]:
    backend = load(library)

    def make(values: Any) -> Any:  # of a copy, with which torch may share its memory
        return backend.asarray(values.copy(), kind.name, device)

    return [subject.sample.lay_out(subject.sample.values, make) for subject in found]


def _layouts(found: Sequence[Subject]) -> list[str]:
    return [subject.case.layout for subject in found]


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = _INTEGERS[one.itemsize]
    return torch.equal(one.view(kind), other.view(kind))
