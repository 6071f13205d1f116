"""One random call: its arrays, its layouts and its options, all drawn from one seed."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from benchmarks.agreement.formats import Format
from gcx import Layout, _compat

__all__ = ["FAULTS", "Gradient", "Trial", "draw_trial"]

_LARGEST = 20_000  # elements of one gradient

_SIZES = (0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 16, 33)
_LARGE_SIZES = (64, 127, 1000, 4097)
_STRENGTHS = (1.0, 1.0, 1.0, 0.5, 0.0, 1 / 3, 1)
# Wrong arguments: an error of a documented type must come before anything is written.
FAULTS = ("rank", "integers", "strength", "shape of out")  # a scalar fits every rank
_MEANS = (0.0, 1.0, 3.0, 1e2, 1e4)


class Gradient(NamedTuple):
    """One gradient; `fan_in` lists axes of `split`, the shape with an axis for each letter.

    The letters are drawn first, and the layout is written from them, so that the fan-in does not
    come from the layout under test.
    """

    values: Any  # float64 or complex128; the format holds each number
    split: tuple[int, ...]
    fan_in: tuple[int, ...]
    layout: Layout
    memory: str
    is_constant: bool  # equal numbers in each output unit

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.values.shape)) or 'scalar'} {self.layout!r} {self.memory}"

    @property
    def has_mean(self) -> bool:
        """Whether there is something to subtract."""
        return prod([self.split[axis] for axis in self.fan_in]) > 1

    def lay_out(self, make: Any) -> Any:
        """Make an array of a library, with the strides that were drawn."""
        return _MEMORY[self.memory](self.values, make)


class Trial(NamedTuple):
    """One call of gcx."""

    seed: tuple[int, int]
    gradients: tuple[Gradient, ...]  # several for `gcx.centralize_many`
    is_list: bool
    strength: float
    out: str  # "none", "self" or "other"
    reproducible: bool
    fault: str  # of the last gradient; empty for a right call

    def __str__(self) -> str:
        gradients = ", ".join(map(str, self.gradients))
        name = "centralize_many" if self.is_list else "centralize"
        options = f"strength={self.strength:g}, out={self.out}, reproducible={self.reproducible}"
        fault = f", wrong {self.fault}" if self.fault else ""
        return f"trial {self.seed[1]}: {name} of {gradients}; {options}{fault}"


def draw_trial(seed: tuple[int, int], kind: Format, *, can_write: bool, has_bits: bool) -> Trial:
    """Draw one call for a library that can write to its arrays or not, with fixed bits or not."""
    rng = np.random.default_rng(seed)
    is_list = rng.random() < 0.3
    reproducible = bool(has_bits and rng.random() < 0.2)
    gradients = tuple(
        _draw_gradient(rng, kind) for _ in range(rng.integers(1, 5) if is_list else 1)
    )
    faults = FAULTS if gradients[-1].values.ndim else FAULTS[1:]
    return Trial(
        seed,
        gradients,
        is_list,
        1.0 if reproducible else float(rng.choice(_STRENGTHS)),
        str(rng.choice(["none", "none", "self", "other"])) if can_write else "none",
        reproducible,
        str(rng.choice(faults)) if rng.random() < 0.1 else "",
    )


def _draw_gradient(rng: np.random.Generator, kind: Format) -> Gradient:
    letters = [*map(str, rng.choice(list("iiioob"), rng.integers(0, 6)))]
    if letters and "i" not in letters:
        letters[rng.integers(len(letters))] = "i"
    sizes = [int(rng.choice(_SIZES)) for _ in letters]
    if sizes and rng.random() < 0.3:
        sizes[rng.integers(len(sizes))] = int(rng.choice(_LARGE_SIZES))
    while np.prod(sizes, dtype=int) > _LARGEST:
        sizes[int(np.argmax(sizes))] //= 2
    if rng.random() < 0.03:  # a bias
        letters, sizes = ["o"], [int(rng.choice(_SIZES))]
    layout, shape = _write_layout(rng, letters, sizes)
    fan_in = tuple(axis for axis, letter in enumerate(letters) if letter == "i")
    is_constant = bool(rng.random() < 0.1)
    values = _draw_numbers(rng, tuple(sizes), fan_in, kind, 0.0 if is_constant else 1.0)
    memory = str(rng.choice(list(_MEMORY)))
    return Gradient(values.reshape(shape), tuple(sizes), fan_in, layout, memory, is_constant)


def _write_layout(
    rng: np.random.Generator, letters: list[str], sizes: list[int]
) -> tuple[Layout, list[int]]:
    """Write the layout of the letters; return the shape of the array as well."""
    if "i" not in letters:
        return Layout(str(rng.choice(["o...", "...o"]))), sizes
    at = int(rng.integers(len(letters)))
    pair = letters[at : at + 2]
    if len(set(pair)) == 2 and 0 not in sizes and rng.random() < 0.3:
        # Two neighbours share an axis of the array; the size of one of them is written down.
        known = int(rng.integers(2))
        text = "".join([*letters[:at], "(", *pair, ")", *letters[at + 2 :]])
        shape = [*sizes[:at], sizes[at] * sizes[at + 1], *sizes[at + 2 :]]
        return Layout(text, **{pair[known]: sizes[at + known]}), shape
    if rng.random() < 0.4:
        return Layout("".join(letters)), sizes
    # "..." stands for a run of fan-in axes, or for none.
    end = start = int(rng.integers(len(letters) + 1))
    while end < len(letters) and letters[end] == "i" and rng.random() < 0.8:
        end += 1
    return Layout("".join([*letters[:start], "...", *letters[end:]])), sizes


def _draw_numbers(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    fan_in: tuple[int, ...],
    kind: Format,
    spread: float,
) -> Any:
    units = [1 if axis in fan_in else size for axis, size in enumerate(shape)]
    mean = float(rng.choice(_MEANS)) if kind.bits > 11 else 1.0

    def normal() -> Any:
        scale = np.exp2(rng.integers(-2, 3, units))
        return scale * (spread * rng.normal(size=shape) + mean * rng.normal(1, 0.3, units))

    values = kind.round(normal() + 1j * normal() if kind.is_complex else normal())
    if values.size and kind.bits > 4 and rng.random() < 0.05:  # float8_e4m3fn has no infinity
        values.flat[rng.integers(values.size)] = rng.choice([np.inf, -np.inf, np.nan])
    return values


def _permuted(values: Any, make: Any) -> Any:
    if values.ndim < 2:
        return make(values)
    axes = np.random.default_rng(values.size).permutation(values.ndim)
    stored = make(np.ascontiguousarray(values.transpose(axes)))
    back = tuple(map(int, np.argsort(axes)))
    return _compat.array_namespace(stored).permute_dims(stored, back)


def _with_gaps(values: Any, make: Any) -> Any:
    return make(np.repeat(values, 2, axis=-1))[..., ::2] if values.ndim else make(values)


def _from_the_middle(values: Any, make: Any) -> Any:
    if not values.ndim:
        return make(values)
    padded = np.pad(values, [(1, 2)] + [(0, 1)] * (values.ndim - 1))
    return make(padded)[(slice(1, -2), *[slice(0, -1)] * (values.ndim - 1))]


_MEMORY = {
    "in order": lambda values, make: make(values),
    "permuted": _permuted,
    "with gaps": _with_gaps,
    "from the middle": _from_the_middle,
}
