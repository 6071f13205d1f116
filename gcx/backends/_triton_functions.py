"""Device functions in Triton: the rules, sums in the canonical order, and access to memory.

Two quirks of Triton matter here: the literal -0.0 becomes 0.0, and the alignment of a pointer can
only be declared after a cast has made it one.
"""

import triton
import triton.language as tl

# Rules: each uses a centralized gradient, with the values of all roles at the same elements.
# Moments are written before the weight is computed, to free their registers.


@triton.jit
def store(roles, place, mask, values, grad, scalars):
    """Write the gradient to the third role."""
    write(roles[2], place, mask, grad)


@triton.jit
def sgd(roles, place, mask, values, grad, scalars):
    """Step as SGD without momentum; in the order of torch's fused kernel."""
    sign, weight_decay, lr = scalars[0], scalars[1], scalars[2]
    weight = values[1]
    write(roles[1], place, mask, weight - lr * (sign * grad + weight_decay * weight))


@triton.jit
def sgd_momentum(roles, place, mask, values, grad, scalars):
    """Step as SGD with momentum. The buffer is the third role; `first` fills it."""
    sign, weight_decay, lr, momentum, undamped, first, nesterov = scalars
    weight = values[1]
    grad = sign * grad + weight_decay * weight
    buffer = tl.where(first != 0, grad, momentum * values[2] + undamped * grad)
    write(roles[2], place, mask, buffer)
    step = tl.where(nesterov != 0, grad + momentum * buffer, buffer)
    write(roles[1], place, mask, weight - lr * step)


@triton.jit
def adamw(roles, place, mask, values, grad, scalars):
    """Step as AdamW. The moments are the third and the fourth role."""
    sign, decay, step_size, beta1, rest1, beta2, rest2, root_bias2, eps = scalars
    grad = sign * grad
    weight = values[1] - decay * values[1]
    first = beta1 * values[2] + rest1 * grad
    second = beta2 * values[3] + rest2 * grad * grad
    write(roles[2], place, mask, first)
    write(roles[3], place, mask, second)
    scale = tl.div_rn(tl.sqrt_rn(second), root_bias2) + eps
    write(roles[1], place, mask, weight - tl.div_rn(step_size * first, scale))


# Sums and means.


@triton.jit
def sum_tree(x, BEFORE: tl.constexpr, LENGTH: tl.constexpr, AFTER: tl.constexpr):
    """Sum the middle one of three axes by a halving tree: its second half is added to its first."""
    if LENGTH == 1:
        return tl.reshape(x, (BEFORE * AFTER,))
    else:
        halves = tl.reshape(x, (BEFORE, 2, LENGTH // 2 * AFTER))
        return sum_tree(tl.sum(halves, 1), BEFORE, LENGTH // 2, AFTER)


@triton.jit
def find_shift(grad_sum, weight_sum, fan_in, factors):
    """Compute the number to subtract from a gradient, of the sums over its fan-in."""
    strength, rate = factors
    size = fan_in.to(grad_sum.dtype)
    shift = divide(grad_sum, size) * tl.cast(strength, size.dtype)
    if rate is None:
        return shift
    else:
        return shift + divide(weight_sum, size) * tl.cast(rate, size.dtype)


@triton.jit
def divide(x, y):
    """Divide with IEEE 754 rounding; Triton's operator has it for float64 alone."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


# Memory.


@triton.jit
def load_pointer(address, offset, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(DTYPE)) + offset
    if VECTOR == 1:
        return pointer
    else:
        return tl.multiple_of(pointer, 16)


@triton.jit
def load_step(pointer, VECTOR: tl.constexpr):
    return tl.multiple_of(tl.load(pointer), VECTOR)


@triton.jit
def load_number(pointer, VECTOR: tl.constexpr):
    return tl.multiple_of(tl.load(pointer).to(tl.int32), VECTOR)


@triton.jit
def read_all(roles, place, mask):
    """Read the values of all roles; Triton drops the reads that the rule does not use."""
    return (
        read(roles[0], place, mask),
        read(roles[1], place, mask),
        read(roles[2], place, mask),
        read(roles[3], place, mask),
    )


@triton.jit
def read(role, place, mask):
    dtype: tl.constexpr = role.dtype.element_ty
    return widen(tl.load(role + place, mask=mask, other=negative_zeros(1, dtype)))


@triton.jit
def write(role, place, mask, x):
    tl.store(role + place, x.to(role.dtype.element_ty), mask=mask)


@triton.jit
def widen(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def sum_nothing(role, SIZE: tl.constexpr):
    """Return sums of no elements, in the dtype in which a role is summed."""
    return widen(negative_zeros(SIZE, role.dtype.element_ty))


@triton.jit
def negative_zeros(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    return tl.full((SIZE,), -(2**31), tl.int32).to(tl.float32, bitcast=True).to(DTYPE)
