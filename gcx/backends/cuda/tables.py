"""Arrays as matrices, cut into tiles: a launch, in the form in which kernels.cu reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import Structure, c_double, c_float, c_int, c_uint64, sizeof
from functools import cache, lru_cache
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from gcx._memory import repeats_itself
from gcx.backends._canonical import SEGMENT

Axes = tuple[int, ...]
# Size and step of an axis. A step is a stride in elements.
_Axis = tuple[int, int]

# Rules of kernels.cu, and the number of arrays of each: the gradients, then the others.
ROLES = {"Store": 2, "StoreRate": 3, "AdamW": 4, "Sgd": 2, "SgdRate": 2}
ROLES |= {"SgdMomentum": 3, "SgdMomentumRate": 3}
# Types of elements in kernels.cu, and their sizes.
ELEMENTS = {"float16": "Half", "bfloat16": "BFloat16", "float32": "float", "float64": "double"}
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# Bytes of parameters: on every driver, and on newer ones.
SMALL, LARGE = 4096, 32764

_MOST = 1 << 29  # units, elements of a fan-in or a step: the kernels count in 32 bits
_MOST_MATRICES = 1 << 10  # of an array; more would not fit in a launch
_THREADS = 256
_PACKS_OF_ROW = 8  # of a thread
_PACKS_OF_FLAT = 4
_MOST_TILES = (1 << 31) // _THREADS  # of an array: the kernels number their threads in 32 bits


class Matrix(NamedTuple):
    """Output units with one fan-in each; the first element is at `offset` in the array.

    In rows, the elements of a fan-in are neighbours in memory, and `step` leads from unit to unit.
    In columns, the units are neighbours, and `step` leads from one element of a fan-in to the next.
    """

    offset: int
    units: int
    fan_in: int
    step: int


class Walk(NamedTuple):
    """The matrices of an array, equal but for their offsets; `kind` is rows, columns or flat.

    A flat array is not centralized: one row holds all of it.
    """

    kind: str
    matrices: tuple[Matrix, ...]


class Tiles(NamedTuple):
    """A matrix cut into tiles: the kernels to launch, in order, and their blocks and threads."""

    kernels: tuple[str, ...]
    blocks: int
    shares: int  # threads of a row, or tiles in a segment of a panel; see kernels.cu
    threads: int = _THREADS
    partials: int = 0  # sums that a tile leaves


Job = tuple[int, Matrix, Tiles]  # and the position of its array


@lru_cache(maxsize=1 << 12)
def find_walk(shape: Axes, steps: Axes, axes: Axes, *, any_order: bool) -> Walk | None:
    """See an array as matrices over its fan-in axes; None if the kernels cannot walk through it.

    `steps` are strides in elements. With `any_order` the fan-in may be walked in the order of
    memory, else it is walked in the order of the axes. An array without axes is flat.

    Weights (out, in) have one row for each output unit:

    >>> find_walk((5, 8), (8, 1), (1,), any_order=False)
    Walk(kind='rows', matrices=(Matrix(offset=0, units=5, fan_in=8, step=8),))
    """
    if 0 in shape or repeats_itself(shape, steps):
        return None
    if not axes:
        (size, step), *rest = _merge(_sort([*zip(shape, steps, strict=True)]))
        found = Walk("flat", (Matrix(0, 1, size, 0),))
        return found if not rest and step in (0, 1) and size <= _MOST else None
    fan_in = [(shape[axis], steps[axis]) for axis in axes]
    (size, step), *rest = _merge(_sort(fan_in) if any_order else fan_in)
    units = _merge(_sort([(shape[a], steps[a]) for a in range(len(shape)) if a not in axes]))
    # Rows are counted along the longest axis. Columns are neighbours along theirs.
    along = max(units) if step == 1 else units[-1]
    others = [axis for axis in units if axis is not along]
    largest = max(size, abs(step), along[0], abs(along[1]))
    if rest or (step != 1 and along[1] != 1) or largest > _MOST:
        return None
    if prod(count for count, _ in others) > _MOST_MATRICES:
        return None
    offsets = [0]
    for count, apart in others:
        offsets = [offset + k * apart for offset in offsets for k in range(count)]
    kind, step = ("rows", along[1]) if step == 1 else ("columns", step)
    return Walk(kind, tuple([Matrix(offset, along[0], size, step) for offset in offsets]))


def is_dense(shape: Sequence[int], steps: Sequence[int]) -> bool:
    """Return True if the elements fill one run of memory."""
    return find_walk(tuple(shape), tuple(steps), (), any_order=True) is not None


def _sort(axes: list[_Axis]) -> list[_Axis]:
    return sorted(axes, key=lambda axis: abs(axis[1]), reverse=True)


def _merge(axes: Sequence[_Axis]) -> list[_Axis]:
    """Join neighbouring axes if one equal step leads through both."""
    merged: list[_Axis] = []
    for size, step in axes:
        if merged and merged[-1][1] == size * step:
            before, _ = merged.pop()
            merged.append((before * size, step))
        elif size > 1:
            merged.append((size, step))
    return merged or [(1, 0)]


def cut(kind: str, matrix: Matrix, itemsize: int) -> Tiles:
    """Cut a matrix into tiles."""
    units, fan_in = matrix.units, matrix.fan_in
    pack = 16 // itemsize
    if kind == "flat":
        return Tiles(("flat",), _divide_up(fan_in, _THREADS * _PACKS_OF_FLAT * pack), 1)
    if kind == "rows":
        held = _PACKS_OF_ROW * pack
        shares = max(2, _power_of_two(_divide_up(fan_in, held)))
        if shares <= _THREADS:
            return Tiles(("rows",), _divide_up(units * shares, _THREADS), shares)
        return Tiles(("long_rows",), units, 1, threads=SEGMENT // held)
    width, rows = 8 * pack, _THREADS // 8 * (4 if pack > 4 else 8)
    splits = _power_of_two(_divide_up(min(fan_in, SEGMENT), rows))
    tiles = splits * _divide_up(fan_in, SEGMENT)
    count = _divide_up(units, width) * tiles
    if tiles == 1:
        return Tiles(("columns",), count, splits)
    return Tiles(("column_sums", "split_columns"), count, splits, partials=width)


class Launch:
    """Arrays for one launch, or two if their columns are split; `places` are their positions."""

    def __init__(self, device: int, rule: str, dtype: str, jobs: Sequence[Job]) -> None:
        itemsize, tiles = ITEMSIZES[dtype], jobs[0][2]
        self.device: int = device
        self.rule: str = rule
        self.dtype: str = dtype
        self.kernels: tuple[str, ...] = tiles.kernels
        self.threads: int = tiles.threads
        size = SMALL if len(jobs) <= count_matrices(rule, dtype, SMALL) else LARGE
        self.matrices: int = count_matrices(rule, dtype, size)
        self.loaded: Sequence[Any] = ()  # the kernels on the device
        self.places: list[int] = list(dict.fromkeys(place for place, _, _ in jobs))
        self._jobs = [(place, matrix.offset * itemsize) for place, matrix, _ in jobs]
        self._is_simple = self._jobs == [(place, 0) for place in self.places]
        self._structure = _make_structure(self.matrices, ROLES[rule], _find_numbers(rule, dtype))
        self._template = self._structure(matrices=len(jobs))
        self.blocks: int = 0
        for k, (_, matrix, tiles) in enumerate(jobs):
            self._template.matrix[k][:] = matrix.units, matrix.fan_in, matrix.step, tiles.shares
            self._template.first_tile[k] = self.blocks
            self.blocks += tiles.blocks
        self.partials: int = self.blocks * tiles.partials * max(itemsize, 4)  # bytes

    def fill(
        self, addresses: Sequence[Sequence[int]], numbers: Sequence[float], partials: int
    ) -> Structure:
        """Make the parameters: addresses by role, then strength, rate, the rule's numbers."""
        work: Structure = self._structure.from_buffer_copy(self._template)
        for row, of_role in zip(work.arrays, addresses, strict=True):
            if not self._is_simple or len(of_role) != len(self._jobs):
                of_role = [of_role[place] + offset for place, offset in self._jobs]  # noqa: PLW2901
            row[: len(of_role)] = of_role
        work.numbers[: len(numbers)] = numbers
        work.partials = partials
        return work


def _find_numbers(rule: str, dtype: str) -> Any:
    # float64 for SGD as well: so torch computes there.
    return (c_double if dtype == "float64" or rule.startswith("Sgd") else c_float) * 9


@cache
def _make_structure(matrices: int, roles: int, numbers: Any) -> Any:
    """Make the structure Work of kernels.cu."""
    fields = [
        ("matrix", c_int * 4 * matrices),
        ("arrays", c_uint64 * matrices * roles),
        ("first_tile", c_int * matrices),
        ("numbers", numbers),
        ("partials", c_uint64),
        ("matrices", c_int),
        ("padding", c_int * 3),  # in kernels.cu, the size is a multiple of 16
    ]
    return type("Work", (Structure,), {"_fields_": fields})


def make_launches(
    device: int, rule: str, dtype: str, walks: Mapping[int, Walk], *, large: bool
) -> list[Launch]:
    """Distribute arrays of one device and dtype, given by position, to launches.

    All matrices of an array are in one launch; an array is left out if they do not fit, or have
    more tiles than the kernels can count. `large` allows parameters of 32 KB.
    """
    most = count_matrices(rule, dtype, LARGE if large else SMALL)
    by_kernel: dict[object, list[list[Job]]] = {}
    for place, walk in walks.items():
        tiles = cut(walk.kind, walk.matrices[0], ITEMSIZES[dtype])
        count = len(walk.matrices)
        if count <= most and count * tiles.blocks < _MOST_TILES:
            lists = by_kernel.setdefault(tiles.kernels, [[]])
            if len(lists[-1]) + count > most:
                lists.append([])
            lists[-1] += [(place, matrix, tiles) for matrix in walk.matrices]
    return [Launch(device, rule, dtype, jobs) for jobs in chain.from_iterable(by_kernel.values())]


def count_matrices(rule: str, dtype: str, size: int) -> int:
    """Count the matrices for which parameters of this size have space."""
    others = sizeof(_find_numbers(rule, dtype)) + 16  # bytes: pointer, count, a gap
    return (size // 16 * 16 - others) // (8 * ROLES[rule] + 20)


def _divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
