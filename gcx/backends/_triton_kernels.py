"""Device code, in Triton: one kernel that centralizes many tensors in one launch.

A launch walks through tiles of `TILE` elements. A tile belongs to a matrix of a tensor (see
`_matrices`), and the kind of the matrix says how it is walked: rows of which a tile holds several,
or one, or a part; columns; or all elements alike, where there is nothing to centralize. What is
done with a centralized gradient is the rule, a function of this file: store it, or step with it.

Sums are in the canonical order (see `_canonical`), so no bit depends on the size of a tile or on
which tile comes first. No tile waits for another one: where columns are cut into several tiles,
each leaves its partial sums behind, and the one that arrives last does the rest.

Some of this is written for what Triton does: the literal -0.0 becomes 0.0, and what is known of
the alignment of a pointer must be said after it has become one. Fusion of multiplication and
addition must be off when this is compiled.
"""

import triton
import triton.language as tl

from gcx.backends import _canonical, _tiles

SEGMENT = tl.constexpr(_canonical.SEGMENT)

ROWS = tl.constexpr(_tiles.ROWS)
LONG_ROWS = tl.constexpr(_tiles.LONG_ROWS)
GATHERED = tl.constexpr(_tiles.GATHERED)
LONG_GATHERED = tl.constexpr(_tiles.LONG_GATHERED)
COLUMNS = tl.constexpr(_tiles.COLUMNS)
FLAT = tl.constexpr(_tiles.FLAT)
ROW_LENGTHS = tl.constexpr(_tiles.ROW_LENGTHS)

# Fields of a row of the table of matrices: its kind and its first tile, what `_matrices.Matrix`
# holds, in how many tiles a segment of a column lies, and where its partial sums go.
KIND = tl.constexpr(0)
FIRST_TILE = tl.constexpr(1)
OFFSET = tl.constexpr(2)
UNITS = tl.constexpr(3)
UNIT_STEP = tl.constexpr(4)
FAN_IN = tl.constexpr(5)
INNER = tl.constexpr(6)
INNER_STEP = tl.constexpr(7)
OUTER_STEP = tl.constexpr(8)
SPLITS = tl.constexpr(9)
SLOT = tl.constexpr(10)
FIELDS = tl.constexpr(11)


@triton.jit(do_not_specialize=["tensors"])
def multi_tensor(
    addresses,  # int64 (4, tensors): of the tensors of each role
    matrices,  # int64 (matrices, FIELDS)
    tiles,  # int32 (tiles, 2): tensor and matrix of each tile
    partials,  # float (slots, 2, WIDTH): sums of gradients and of weights
    arrivals,  # int32 (slots,): tiles of a panel that have arrived; zero between launches
    tensors,
    strength: tl.float64,
    rate: tl.float64,
    scalars,  # those of the rule
    RULE: tl.constexpr,
    DTYPES: tl.constexpr,  # of the roles
    COUPLED: tl.constexpr,  # whether the mean of the weights counts at all
    VECTOR: tl.constexpr,  # addresses are multiples of 16 bytes, steps of so many elements
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a tile
    HAS_GATHERED: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_FLAT: tl.constexpr,
):
    """Compute ``grad - (strength * mean(grad) + rate * mean(weight))``, and apply the rule to it.

    Roles are the gradient, the weight, and up to two more; those not needed repeat another one.
    """
    pid = tl.program_id(0)
    address = addresses + tl.load(tiles + 2 * pid)
    matrix = matrices + tl.load(tiles + 2 * pid + 1) * FIELDS
    kind = tl.load(matrix + KIND)
    tile = pid - tl.load(matrix + FIRST_TILE).to(tl.int32)
    offset = tl.load(matrix + OFFSET)
    roles = (
        _pointer(address, offset, DTYPES[0], VECTOR),
        _pointer(address + tensors, offset, DTYPES[1], VECTOR),
        _pointer(address + 2 * tensors, offset, DTYPES[2], VECTOR),
        _pointer(address + 3 * tensors, offset, DTYPES[3], VECTOR),
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


# Rules: what is done with a centralized gradient, at the same places of all roles. Moments are
# written before the weight is computed, which needs their registers.


@triton.jit
def store(roles, place, mask, values, grad, scalars):
    """Write the gradient to the third role."""
    _write(roles[2], place, mask, grad)


@triton.jit
def sgd(roles, place, mask, values, grad, scalars):
    """Step as SGD without momentum; in the order of torch's fused kernel."""
    sign, weight_decay, lr = scalars[0], scalars[1], scalars[2]
    weight = values[1]
    _write(roles[1], place, mask, weight - lr * (sign * grad + weight_decay * weight))


@triton.jit
def sgd_momentum(roles, place, mask, values, grad, scalars):
    """Step as SGD with momentum, the buffer being the third role; `first` fills it."""
    sign, weight_decay, lr, momentum, undamped, first, nesterov = scalars
    weight = values[1]
    grad = sign * grad + weight_decay * weight
    buffer = tl.where(first != 0, grad, momentum * values[2] + undamped * grad)
    _write(roles[2], place, mask, buffer)
    step = tl.where(nesterov != 0, grad + momentum * buffer, buffer)
    _write(roles[1], place, mask, weight - lr * step)


@triton.jit
def adamw(roles, place, mask, values, grad, scalars):
    """Step as AdamW, the moments being the third and the fourth role."""
    sign, decay, step_size, beta1, rest1, beta2, rest2, root_bias2, eps = scalars
    grad = sign * grad
    weight = values[1] - decay * values[1]
    first = beta1 * values[2] + rest1 * grad
    second = beta2 * values[3] + rest2 * grad * grad
    _write(roles[2], place, mask, first)
    _write(roles[3], place, mask, second)
    scale = tl.div_rn(tl.sqrt_rn(second), root_bias2) + eps
    _write(roles[1], place, mask, weight - tl.div_rn(step_size * first, scale))


# Kinds: how a matrix is walked.


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
    """Walk as many rows as go into a tile, each padded to one of the lengths."""
    COUNT: tl.constexpr = 4 ** (ROW_LENGTHS - 1 - LENGTH)
    PADDED: tl.constexpr = TILE // COUNT
    fan_in = _number(matrix + FAN_IN, VECTOR)
    unit = tile * COUNT + tl.arange(0, COUNT)[:, None]
    element = tl.arange(0, PADDED)[None, :]
    mask = (unit < _number(matrix + UNITS, 1)) & (element < fan_in)
    place = unit * _step(matrix + UNIT_STEP, VECTOR) + _within(matrix, element, GATHER)
    values = _read_all(roles, place, mask)
    grad_sum = _tree(values[0], COUNT, PADDED, 1)
    weight_sum = grad_sum if factors[1] is None else _tree(values[1], COUNT, PADDED, 1)
    shift = _shift(grad_sum, weight_sum, fan_in, factors)
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
    """Walk a row of several tiles twice; the second time it comes out of a cache."""
    fan_in = _number(matrix + FAN_IN, VECTOR)
    start = tile * _step(matrix + UNIT_STEP, VECTOR)
    row = (matrix, start, fan_in)
    grad_sum = _row_sum(roles[0], row, GATHER, TILE)
    weight_sum = grad_sum if factors[1] is None else _row_sum(roles[1], row, GATHER, TILE)
    shift = _shift(grad_sum, weight_sum, fan_in, factors)
    for first in range(0, fan_in, TILE):
        element = first + tl.arange(0, TILE)
        place = start + _within(matrix, element, GATHER)
        values = _read_all(roles, place, element < fan_in)
        RULE(roles, place, element < fan_in, values, values[0] - shift, scalars)


@triton.jit
def _row_sum(role, row, GATHER: tl.constexpr, TILE: tl.constexpr):
    total = _nothing(role, 1)
    for first in range(0, row[2], SEGMENT):
        total += _tree(_folded(role, row, first, TILE, GATHER, TILE), 1, TILE, 1)
    return total


@triton.jit
def _folded(role, row, first, LEVEL: tl.constexpr, GATHER: tl.constexpr, TILE: tl.constexpr):
    """Compute a tile of what the tree of a segment holds when `LEVEL` elements are left."""
    if LEVEL == SEGMENT:
        matrix, start, fan_in = row
        element = first + tl.arange(0, TILE)
        return _read(role, start + _within(matrix, element, GATHER), element < fan_in)
    else:
        lower = _folded(role, row, first, 2 * LEVEL, GATHER, TILE)
        return lower + _folded(role, row, first + LEVEL, 2 * LEVEL, GATHER, TILE)


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
    """Walk a panel of columns, cut into tiles of which the last to arrive does the rest.

    A tile takes the elements of a segment that are `splits` apart. Their sums are what the tree of
    the segment holds when `splits` elements of it are left.
    """
    HEIGHT: tl.constexpr = TILE // WIDTH
    fan_in = _number(matrix + FAN_IN, 1)
    splits = _number(matrix + SPLITS, 1)
    parts = tl.cdiv(fan_in, SEGMENT) * splits
    part = tile % parts
    unit = tl.multiple_of(tile // parts * WIDTH, WIDTH) + tl.arange(0, WIDTH)[None, :]
    in_panel = unit < _number(matrix + UNITS, VECTOR)
    step = _step(matrix + INNER_STEP, VECTOR)
    row = tl.arange(0, HEIGHT)[:, None]

    element = part // splits * SEGMENT + part % splits + splits * row
    mask = (element < fan_in) & in_panel
    place = element * step + unit
    if parts == 1:
        values = _read_all(roles, place, mask)
        grad_sum, weight_sum = _column_sums(values, factors, HEIGHT, WIDTH)
        shift = _shift(grad_sum, weight_sum, fan_in, factors)
        RULE(roles, place, mask, values, values[0] - shift[None, :], scalars)
    else:
        # What is not summed is read below, once: reading is not moved past an atomic operation.
        summed = (_read(roles[0], place, mask), _read(roles[1], place, mask))
        grad_sum, weight_sum = _column_sums(summed, factors, HEIGHT, WIDTH)
        slot = _number(matrix + SLOT, 1) + tile - part  # of the first tile of the panel
        _leave(partials, slot + part, grad_sum, weight_sum, WIDTH)
        if _is_last(arrivals + slot, parts):
            grad_sum = _combined(partials, slot, parts, splits, 0, HEIGHT, WIDTH)
            weight_sum = _combined(partials, slot, parts, splits, 1, HEIGHT, WIDTH)
            shift = _shift(grad_sum, weight_sum, fan_in, factors)
            in_tile = row * step + unit
            for first in range(0, fan_in, HEIGHT):
                mask = (first + row < fan_in) & in_panel
                place = first * step + in_tile  # in this order, which takes fewer registers
                values = _read_all(roles, place, mask)
                RULE(roles, place, mask, values, values[0] - shift[None, :], scalars)


@triton.jit
def _column_sums(values, factors, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Sum gradients, and weights if their mean counts; Triton drops their reading if not."""
    grad_sum = _tree(values[0], 1, HEIGHT, WIDTH)
    return grad_sum, grad_sum if factors[1] is None else _tree(values[1], 1, HEIGHT, WIDTH)


@triton.jit
def _leave(partials, slot, grad_sum, weight_sum, WIDTH: tl.constexpr):
    place = partials + slot * (2 * WIDTH) + tl.arange(0, WIDTH)
    tl.store(place, grad_sum)
    tl.store(place + WIDTH, weight_sum)


@triton.jit
def _is_last(counter, parts):
    """Count this tile, and say whether all the others of its panel have left their sums."""
    tl.debug_barrier()  # the atomic operation publishes what all threads of the tile have stored
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _combined(partials, slot, parts, splits, k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Add the sums of the tiles: up the tree of a segment, then one segment after the other."""
    split = tl.arange(0, SEGMENT // HEIGHT)[:, None]
    place = partials + k * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = _nothing(partials, WIDTH)
    for first in range(slot, slot + parts, splits):
        sums = tl.load(
            place + (first + split) * (2 * WIDTH),
            mask=split < splits,
            other=_negative_zeros(1, partials.dtype.element_ty),
            cache_modifier=".cg",  # where other tiles have left them, not in a cache of this one
        )
        total += _tree(sums, 1, SEGMENT // HEIGHT, WIDTH)
    return total


@triton.jit
def _flat(
    roles, matrix, tile, scalars, RULE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr
):
    """Walk the elements of a dense tensor as they come, not centralized."""
    place = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < _step(matrix + FAN_IN, VECTOR)
    values = _read_all(roles, place, mask)
    RULE(roles, place, mask, values, values[0], scalars)


# Sums and means.


@triton.jit
def _tree(x, BEFORE: tl.constexpr, LENGTH: tl.constexpr, AFTER: tl.constexpr):
    """Sum the middle one of three axes, by adding its second half to its first."""
    if LENGTH == 1:
        return tl.reshape(x, (BEFORE * AFTER,))
    else:
        halves = tl.reshape(x, (BEFORE, 2, LENGTH // 2 * AFTER))
        return _tree(tl.sum(halves, 1), BEFORE, LENGTH // 2, AFTER)


@triton.jit
def _shift(grad_sum, weight_sum, fan_in, factors):
    strength, rate = factors
    size = fan_in.to(grad_sum.dtype)
    shift = _divided(grad_sum, size) * tl.cast(strength, size.dtype)
    if rate is None:
        return shift
    else:
        return shift + _divided(weight_sum, size) * tl.cast(rate, size.dtype)


@triton.jit
def _divided(x, y):
    """Divide as IEEE 754 says; the operator of Triton does so for float64 alone."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


# Memory.


@triton.jit
def _pointer(address, offset, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(DTYPE)) + offset
    if VECTOR == 1:
        return pointer
    else:
        return tl.multiple_of(pointer, 16)


@triton.jit
def _step(pointer, VECTOR: tl.constexpr):
    return tl.multiple_of(tl.load(pointer), VECTOR)


@triton.jit
def _number(pointer, VECTOR: tl.constexpr):
    return tl.multiple_of(tl.load(pointer).to(tl.int32), VECTOR)


@triton.jit
def _within(matrix, element, GATHER: tl.constexpr):
    """Return the distances of elements of a fan-in from its start."""
    if GATHER:
        inner = _number(matrix + INNER, 1)
        run = (element // inner) * tl.load(matrix + OUTER_STEP)
        return run + (element % inner) * tl.load(matrix + INNER_STEP)
    else:
        return element


@triton.jit
def _read_all(roles, place, mask):
    """Values of all roles; Triton drops the reading of those that the rule makes no use of."""
    return (
        _read(roles[0], place, mask),
        _read(roles[1], place, mask),
        _read(roles[2], place, mask),
        _read(roles[3], place, mask),
    )


@triton.jit
def _read(role, place, mask):
    dtype: tl.constexpr = role.dtype.element_ty
    return _widened(tl.load(role + place, mask=mask, other=_negative_zeros(1, dtype)))


@triton.jit
def _write(role, place, mask, x):
    tl.store(role + place, x.to(role.dtype.element_ty), mask=mask)


@triton.jit
def _widened(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _nothing(role, SIZE: tl.constexpr):
    """Return sums of no elements of a role."""
    return _widened(_negative_zeros(SIZE, role.dtype.element_ty))


@triton.jit
def _negative_zeros(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    return tl.full((SIZE,), -(2**31), tl.int32).to(tl.float32, bitcast=True).to(DTYPE)
