"""Device code, in Triton: one kernel that centralizes many tensors in one launch.

A launch walks through tiles of `TILE` elements. A tile belongs to a matrix of a tensor (see
`_matrices`). The kind of the matrix says how it is walked: by rows, where a tile holds several, one
or a part; by columns; or flat, if there is nothing to centralize. The rule, a function
of `_triton_functions`, uses the centralized gradient: it stores it, or takes an optimizer's step.

Sums are in the canonical order (see `_canonical`), so no bit depends on the size of a tile or on
the order of the tiles. No tile waits for another one: if columns are cut into several tiles, each
stores its partial sums, and the last to arrive adds them up and finishes the columns.

This must be compiled without fusion of multiplication and addition.
"""

import triton
import triton.language as tl

from gcx.backends import _canonical, _tiles
from gcx.backends._triton_functions import (
    find_shift,
    load_number,
    load_pointer,
    load_step,
    negative_zeros,
    read,
    read_all,
    sum_nothing,
    sum_tree,
)

SEGMENT = tl.constexpr(_canonical.SEGMENT)

ROWS = tl.constexpr(_tiles.ROWS)
LONG_ROWS = tl.constexpr(_tiles.LONG_ROWS)
GATHERED = tl.constexpr(_tiles.GATHERED)
LONG_GATHERED = tl.constexpr(_tiles.LONG_GATHERED)
COLUMNS = tl.constexpr(_tiles.COLUMNS)
FLAT = tl.constexpr(_tiles.FLAT)
ROW_LENGTHS = tl.constexpr(_tiles.ROW_LENGTHS)

# Fields of a row of the table of matrices: the kind, the first tile, the fields of
# `_matrices.Matrix`, the number of tiles in a segment of a column, and the first slot for sums.
KIND, FIRST_TILE, OFFSET, UNITS, UNIT_STEP, FAN_IN = map(tl.constexpr, range(6))
INNER, INNER_STEP, OUTER_STEP, SPLITS, SLOT, FIELDS = map(tl.constexpr, range(6, 12))


@triton.jit(do_not_specialize=["tensors"])
def multi_tensor(
    addresses,  # int64 (4, tensors): one row a role
    matrices,  # int64 (matrices, FIELDS)
    tiles,  # int32 (tiles, 2): tensor and matrix of each tile
    partials,  # float (slots, 2, WIDTH): sums of gradients, sums of weights
    arrivals,  # int32 (slots,): tiles of a panel that have arrived; zero between launches
    tensors,
    strength: tl.float64,
    rate: tl.float64,
    scalars,  # of the rule
    RULE: tl.constexpr,
    DTYPES: tl.constexpr,  # of the roles
    COUPLED: tl.constexpr,  # true if the mean of the weights is subtracted as well
    VECTOR: tl.constexpr,  # if above 1: it divides steps, and 16 bytes divide addresses
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a tile
    HAS_GATHERED: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_FLAT: tl.constexpr,
):
    """Compute ``grad - (strength * mean(grad) + rate * mean(weight))``, and apply the rule to it.

    The roles are the gradient, the weight, and up to two more. Unused roles repeat another one.
    """
    pid = tl.program_id(0)
    address = addresses + tl.load(tiles + 2 * pid)
    matrix = matrices + tl.load(tiles + 2 * pid + 1) * FIELDS
    kind = tl.load(matrix + KIND)
    tile = pid - tl.load(matrix + FIRST_TILE).to(tl.int32)
    offset = tl.load(matrix + OFFSET)
    roles = (
        load_pointer(address, offset, DTYPES[0], VECTOR),
        load_pointer(address + tensors, offset, DTYPES[1], VECTOR),
        load_pointer(address + 2 * tensors, offset, DTYPES[2], VECTOR),
        load_pointer(address + 3 * tensors, offset, DTYPES[3], VECTOR),
    )
    factors = (strength, rate if COUPLED else None)
    for k in tl.static_range(ROW_LENGTHS):
        if kind == ROWS + k:
            _rows(roles, matrix, tile, factors, scalars, RULE, VECTOR, False, k, TILE)
        if HAS_GATHERED:
            if kind == GATHERED + k:
                _rows(roles, matrix, tile, factors, scalars, RULE, 1, True, k, TILE)
    if kind == LONG_ROWS:
        _long_row(roles, matrix, tile, factors, scalars, RULE, VECTOR, False, TILE)
    if HAS_GATHERED:
        if kind == LONG_GATHERED:
            _long_row(roles, matrix, tile, factors, scalars, RULE, 1, True, TILE)
    if HAS_COLUMNS:
        if kind == COLUMNS:
            _columns(
                roles, matrix, tile, factors, scalars, partials, arrivals, RULE, VECTOR, TILE, WIDTH
            )
    if HAS_FLAT:
        if kind == FLAT:
            _flat(roles, matrix, tile, scalars, RULE, VECTOR, TILE)


# Kinds: how a matrix is walked.


@triton.jit
def _within(matrix, element, GATHER: tl.constexpr):
    """Return the distances of elements of a fan-in from its start."""
    if GATHER:
        inner = load_number(matrix + INNER, 1)
        run = (element // inner) * tl.load(matrix + OUTER_STEP)
        return run + (element % inner) * tl.load(matrix + INNER_STEP)
    else:
        return element


@triton.jit
def _rows(
    roles,
    matrix,
    tile,
    factors,
    scalars,
    RULE: tl.constexpr,
    VECTOR: tl.constexpr,
    GATHER: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Walk the rows of a tile, each padded to one of the lengths."""
    COUNT: tl.constexpr = 4 ** (ROW_LENGTHS - 1 - LENGTH)
    PADDED: tl.constexpr = TILE // COUNT
    fan_in = load_number(matrix + FAN_IN, VECTOR)
    unit = tile * COUNT + tl.arange(0, COUNT)[:, None]
    element = tl.arange(0, PADDED)[None, :]
    mask = (unit < load_number(matrix + UNITS, 1)) & (element < fan_in)
    place = unit * load_step(matrix + UNIT_STEP, VECTOR) + _within(matrix, element, GATHER)
    values = read_all(roles, place, mask)
    grad_sum = sum_tree(values[0], COUNT, PADDED, 1)
    weight_sum = grad_sum if factors[1] is None else sum_tree(values[1], COUNT, PADDED, 1)
    shift = find_shift(grad_sum, weight_sum, fan_in, factors)
    RULE(roles, place, mask, values, values[0] - shift[:, None], scalars)


@triton.jit
def _long_row(
    roles,
    matrix,
    tile,
    factors,
    scalars,
    RULE: tl.constexpr,
    VECTOR: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Walk a row of several tiles twice; the second reading comes from a cache."""
    fan_in = load_number(matrix + FAN_IN, VECTOR)
    start = tile * load_step(matrix + UNIT_STEP, VECTOR)
    row = (matrix, start, fan_in)
    grad_sum = _sum_row(roles[0], row, GATHER, TILE)
    weight_sum = grad_sum if factors[1] is None else _sum_row(roles[1], row, GATHER, TILE)
    shift = find_shift(grad_sum, weight_sum, fan_in, factors)
    for first in range(0, fan_in, TILE):
        element = first + tl.arange(0, TILE)
        place = start + _within(matrix, element, GATHER)
        values = read_all(roles, place, element < fan_in)
        RULE(roles, place, element < fan_in, values, values[0] - shift, scalars)


@triton.jit
def _sum_row(role, row, GATHER: tl.constexpr, TILE: tl.constexpr):
    total = sum_nothing(role, 1)
    for first in range(0, row[2], SEGMENT):
        total += sum_tree(_fold(role, row, first, TILE, GATHER, TILE), 1, TILE, 1)
    return total


@triton.jit
def _fold(role, row, first, LEVEL: tl.constexpr, GATHER: tl.constexpr, TILE: tl.constexpr):
    """Compute a tile of the level of a segment's tree that has `LEVEL` elements."""
    if LEVEL == SEGMENT:
        matrix, start, fan_in = row
        element = first + tl.arange(0, TILE)
        return read(role, start + _within(matrix, element, GATHER), element < fan_in)
    else:
        lower = _fold(role, row, first, 2 * LEVEL, GATHER, TILE)
        return lower + _fold(role, row, first + LEVEL, 2 * LEVEL, GATHER, TILE)


@triton.jit
def _columns(
    roles,
    matrix,
    tile,
    factors,
    scalars,
    partials,
    arrivals,
    RULE: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Walk a panel of columns, cut into tiles; the last tile to arrive finishes the panel.

    A tile sums the elements of a segment that are `splits` apart. The sums of all its tiles are the
    level of the segment's tree that has `splits` elements.
    """
    HEIGHT: tl.constexpr = TILE // WIDTH
    fan_in = load_number(matrix + FAN_IN, 1)
    splits = load_number(matrix + SPLITS, 1)
    parts = tl.cdiv(fan_in, SEGMENT) * splits
    part = tile % parts
    unit = tl.multiple_of(tile // parts * WIDTH, WIDTH) + tl.arange(0, WIDTH)[None, :]
    in_panel = unit < load_number(matrix + UNITS, VECTOR)
    step = load_step(matrix + INNER_STEP, VECTOR)
    row = tl.arange(0, HEIGHT)[:, None]

    element = part // splits * SEGMENT + part % splits + splits * row
    mask = (element < fan_in) & in_panel
    place = element * step + unit
    if parts == 1:
        values = read_all(roles, place, mask)
        grad_sum, weight_sum = _sum_columns(values, factors, HEIGHT, WIDTH)
        shift = find_shift(grad_sum, weight_sum, fan_in, factors)
        RULE(roles, place, mask, values, values[0] - shift[None, :], scalars)
    else:
        # Other roles are read below, once: Triton moves no read past an atomic operation.
        summed = (read(roles[0], place, mask), read(roles[1], place, mask))
        grad_sum, weight_sum = _sum_columns(summed, factors, HEIGHT, WIDTH)
        slot = load_number(matrix + SLOT, 1) + tile - part  # of the first tile of the panel
        _store_sums(partials, slot + part, grad_sum, weight_sum, WIDTH)
        if _is_last(arrivals + slot, parts):
            grad_sum = _combine(partials, slot, parts, splits, 0, HEIGHT, WIDTH)
            weight_sum = _combine(partials, slot, parts, splits, 1, HEIGHT, WIDTH)
            shift = find_shift(grad_sum, weight_sum, fan_in, factors)
            in_tile = row * step + unit
            for first in range(0, fan_in, HEIGHT):
                mask = (first + row < fan_in) & in_panel
                place = first * step + in_tile  # this order takes fewer registers
                values = read_all(roles, place, mask)
                RULE(roles, place, mask, values, values[0] - shift[None, :], scalars)


@triton.jit
def _sum_columns(values, factors, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Sum gradients, and weights if their mean counts; otherwise Triton drops the reads of them."""
    grad_sum = sum_tree(values[0], 1, HEIGHT, WIDTH)
    return grad_sum, grad_sum if factors[1] is None else sum_tree(values[1], 1, HEIGHT, WIDTH)


@triton.jit
def _store_sums(partials, slot, grad_sum, weight_sum, WIDTH: tl.constexpr):
    place = partials + slot * (2 * WIDTH) + tl.arange(0, WIDTH)
    tl.store(place, grad_sum)
    tl.store(place + WIDTH, weight_sum)


@triton.jit
def _is_last(counter, parts):
    """Count this tile; true if every other tile of its panel has stored its sums."""
    tl.debug_barrier()  # then the atomic operation publishes the stores of all threads of the tile
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _combine(partials, slot, parts, splits, k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Add the sums of the tiles: by the tree of each segment, then segment after segment."""
    split = tl.arange(0, SEGMENT // HEIGHT)[:, None]
    place = partials + k * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = sum_nothing(partials, WIDTH)
    for first in range(slot, slot + parts, splits):
        sums = tl.load(
            place + (first + split) * (2 * WIDTH),
            mask=split < splits,
            other=negative_zeros(1, partials.dtype.element_ty),
            cache_modifier=".cg",  # from the cache that all tiles share
        )
        total += sum_tree(sums, 1, SEGMENT // HEIGHT, WIDTH)
    return total


@triton.jit
def _flat(
    roles, matrix, tile, scalars, RULE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr
):
    """Walk the elements of a dense tensor in the order of memory, not centralized."""
    place = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < load_step(matrix + FAN_IN, VECTOR)
    values = read_all(roles, place, mask)
    RULE(roles, place, mask, values, values[0], scalars)
