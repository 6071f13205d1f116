"""Tables for the kernel of `_triton_kernels`: the tensor and the matrix of each tile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gcx.backends._canonical import SEGMENT
from gcx.backends._matrices import Matrix, matrices
from gcx.backends._memory import divide_up, has_overlap, is_dense, power_of_two

Axes = tuple[int, ...]

# Kinds of matrices. A row is padded to one of `ROW_LENGTHS` lengths, each four times the last one.
# The longest is a tile; a row that exceeds it is long. The elements of a gathered row are not
# neighbours in memory. A flat matrix is a dense tensor that is not centralized.
ROW_LENGTHS = 4
ROWS = 0
LONG_ROWS = ROWS + ROW_LENGTHS
GATHERED = LONG_ROWS + 1
LONG_GATHERED = GATHERED + ROW_LENGTHS
COLUMNS = LONG_GATHERED + 1
FLAT = COLUMNS + 1
ALL_GATHERED = range(GATHERED, LONG_GATHERED + 1)

# Elements of a tile. Elements that are read one by one need more registers, so fewer fit.
TILE = 4096
TILE_ONE_BY_ONE = 2048
# Columns of a tile: one cache line in float32.
WIDTH = 32

# Most units, and most elements of a fan-in: the kernel counts them in 32 bits, in whole tiles.
_MOST = 1 << 30


class Tables(NamedTuple):
    """Tables for one launch, on the CPU.

    `tiles`, int32 (tiles, 2), holds the tensor and the matrix of each tile. `matrices`, int64, has
    a row for each matrix, with the fields that `_triton_kernels` names. The kernel reads `vector`
    elements at once if the addresses are aligned, and needs `slots` slots for partial sums.
    """

    tiles: Tensor
    matrices: Tensor
    vector: int
    tile: int
    slots: int
    kinds: frozenset[int]


class _Entry(NamedTuple):
    """A matrix of a tensor, and its number of tiles."""

    tensor: int
    matrix: Matrix
    kind: int
    tiles: int
    parts: int = 1  # tiles in a panel of columns
    splits: int = 1  # tiles in a segment of a panel


def make_tables(
    tensors: Sequence[Tensor], axes: Sequence[Axes], *, vector: int, any_order: bool
) -> list[Tables]:
    """Split tensors into a vectorised launch and a scalar one; either may be missing.

    16 bytes hold `vector` elements. Tensors without axes are not centralized.
    """
    together: list[_Entry] = []
    one_by_one: list[_Entry] = []
    for k, (tensor, fan_in) in enumerate(zip(tensors, axes, strict=True)):
        found = find_walk(tensor, fan_in, any_order=any_order)
        if found is None:
            msg = f"no matrices in shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            raise ValueError(msg)
        for matrix in found:
            entry = _make_entry(k, matrix, TILE, is_flat=not fan_in)
            if _is_even(entry, vector):
                together.append(entry)
            else:
                one_by_one.append(_make_entry(k, matrix, TILE_ONE_BY_ONE, is_flat=not fan_in))
    sorts = ((together, vector, TILE), (one_by_one, 1, TILE_ONE_BY_ONE))
    return [_make_tables(entries, step, tile) for entries, step, tile in sorts if entries]


def find_walk(tensor: Tensor, axes: Axes, *, any_order: bool) -> tuple[Matrix, ...] | None:
    """Find the matrices of a tensor; None if the kernel cannot walk through it."""
    if tensor.numel() == 0:
        return None
    return _find_walk(tensor.shape, tensor.stride(), axes, any_order)


@lru_cache(maxsize=1 << 12)
def _find_walk(
    shape: tuple[int, ...], steps: tuple[int, ...], axes: Axes, any_order: bool
) -> tuple[Matrix, ...] | None:
    if not axes:
        every_axis = range(len(shape))
        dense = is_dense(shape, steps)
        return matrices(shape, steps, every_axis, any_order=True) if dense else None
    found = matrices(shape, steps, axes, any_order=any_order)
    if found is None or has_overlap(shape, steps):
        return None
    return found if max(found[0].units, found[0].fan_in) <= _MOST else None


def _make_entry(tensor: int, matrix: Matrix, tile: int, *, is_flat: bool) -> _Entry:
    if is_flat:
        return _Entry(tensor, matrix, FLAT, divide_up(matrix.fan_in, tile))
    if matrix.is_columns:
        elements_at_once = tile // WIDTH
        splits = max(1, power_of_two(min(matrix.fan_in, SEGMENT)) // elements_at_once)
        parts = splits * divide_up(matrix.fan_in, SEGMENT)
        tiles = parts * divide_up(matrix.units, WIDTH)
        return _Entry(tensor, matrix, COLUMNS, tiles, parts, splits)
    first = ROWS if matrix.is_rows else GATHERED
    for k in range(ROW_LENGTHS):
        rows_at_once = 4 ** (ROW_LENGTHS - 1 - k)
        if matrix.fan_in <= tile // rows_at_once:
            return _Entry(tensor, matrix, first + k, divide_up(matrix.units, rows_at_once))
    return _Entry(tensor, matrix, first + ROW_LENGTHS, matrix.units)


def _is_even(entry: _Entry, vector: int) -> bool:
    """Return True if elements can be read `vector` at a time, given an aligned tensor."""
    _, units, unit_step, fan_in, _, inner_step, _ = matrix = entry.matrix
    if entry.kind == COLUMNS:
        distances = (units, inner_step)
    elif matrix.is_rows or entry.kind == FLAT:
        distances = (fan_in, unit_step)
    else:
        return False
    return all(distance % vector == 0 for distance in (matrix.offset, *distances))


def _make_tables(entries: list[_Entry], vector: int, tile: int) -> Tables:
    # Long tiles go first, so that the device is busy to the end.
    entries.sort(key=lambda entry: _count_work(entry, tile), reverse=True)
    counts = torch.tensor([entry.tiles for entry in entries], device="cpu")
    slots = torch.tensor([entry.tiles * (entry.parts > 1) for entry in entries], device="cpu")
    numbers = torch.arange(len(entries), device="cpu")
    owners = torch.tensor([entry.tensor for entry in entries], device="cpu")
    fields = [
        torch.tensor([entry.kind for entry in entries], device="cpu"),
        counts.cumsum(0) - counts,
        *torch.tensor([entry.matrix for entry in entries], device="cpu").unbind(1),
        torch.tensor([entry.splits for entry in entries], device="cpu"),
        slots.cumsum(0) - slots,
    ]
    return Tables(
        tiles=torch.stack((owners, numbers), 1).repeat_interleave(counts, 0).int(),
        matrices=torch.stack(fields, 1),
        vector=vector,
        tile=tile,
        slots=int(slots.sum()),
        kinds=frozenset(entry.kind for entry in entries),
    )


def _count_work(entry: _Entry, tile: int) -> int:
    """Count the elements that the slowest tile reads."""
    if entry.parts > 1:
        return entry.matrix.fan_in * WIDTH
    return entry.matrix.fan_in if entry.kind in (LONG_ROWS, LONG_GATHERED) else tile
