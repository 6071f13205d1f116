"""Gradients as they lie in memory, and what the kernels must make of them, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import canonical_order
import same_bits

Axes = tuple[int, ...]

DTYPES = [getattr(torch, name) for name in canonical_order.DTYPES]


def plain(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype)


def behind(count: int, *shape: int) -> Callable[[torch.dtype], Tensor]:
    """Some elements behind the start of other memory."""
    size = int(np.prod(shape))
    return lambda dtype: torch.empty(count + size, dtype=dtype)[count:].view(shape)


def part(shape: tuple[int, ...], *index: Any) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype)[index]


def turned(shape: tuple[int, ...], *order: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype).permute(order)


CHANNELS_LAST = turned((5, 3, 3, 40), 0, 3, 1, 2)

# What a gradient is in memory, and its fan-in axes.
CASES: dict[str, tuple[Callable[[torch.dtype], Tensor], Axes]] = {
    "two": (plain(7, 2), (1,)),
    "three": (plain(5, 3), (1,)),
    "9": (plain(70, 9), (1,)),
    "stem": (plain(64, 3, 7, 7), (1, 2, 3)),
    "a power of two": (plain(5, 64), (1,)),
    "576": (plain(30, 576), (1,)),
    "1025": (plain(3, 1025), (1,)),
    "a tile": (plain(2, 4096), (1,)),
    "4608": (plain(3, 4608), (1,)),
    "14336": (plain(2, 14336), (1,)),
    "a segment": (plain(2, 16384), (1,)),
    "a segment and one": (plain(2, 16385), (1,)),
    "segments": (plain(2, 50000), (1,)),
    "one row": (plain(1, 100), (1,)),
    "all": (plain(8, 9), (0, 1)),
    "rows in wider ones": (part((20, 300), slice(None), slice(256)), (1,)),
    "rows of every second": (part((20, 300), slice(None), slice(None, None, 2)), (1,)),
    "behind one": (behind(1, 30, 64), (1,)),
    "behind three, columns": (behind(3, 64, 32), (0,)),
    "few columns": (plain(27, 64), (0,)),
    "9 columns": (plain(9, 7), (0,)),
    "two of fan-in": (plain(2, 33), (0,)),
    "HWIO": (plain(3, 3, 16, 40), (0, 1, 2)),
    "columns in parts": (plain(768, 50), (0,)),
    "columns in uneven parts": (plain(1500, 33), (0,)),
    "columns in wider ones": (part((300, 100), slice(None), slice(8, 72)), (0,)),
    "rows turned": (turned((40, 200), 1, 0), (0,)),
    "columns turned": (turned((200, 40), 1, 0), (1,)),
    "io": (plain(16, 8, 3, 3), (0, 2, 3)),
    "io, wide": (plain(300, 3, 5), (0, 2)),
    "io, long": (plain(700, 3, 7), (0, 2)),
    "oio": (plain(4, 50, 24), (1,)),
    "channels last": (CHANNELS_LAST, (1, 2, 3)),
    "experts of rows": (part((3, 20, 64), slice(None), slice(0, 10)), (2,)),
}


KINDS: list[Callable[[Any, Any, Any], Any]] = [
    lambda x, random, dtype: x,
    lambda x, random, dtype: x * 1e-3 + 1.7,
    lambda x, random, dtype: x * np.exp(random.uniform(-12, 3, x.shape)),
    lambda x, random, dtype: np.copysign(0, x),
    lambda x, random, dtype: np.full_like(x, -0.0),
    lambda x, random, dtype: x * 4 * torch.finfo(dtype).smallest_normal,
]


def filled(tensor: Tensor, axes: Axes, seed: int = 0) -> Tensor:
    """Fill with random numbers, of another kind in each output unit."""
    random = np.random.default_rng(seed)
    numbers = random.standard_normal(tuple(tensor.shape))
    for k, unit in enumerate(canonical_order.output_units(numbers.shape, axes), seed):
        numbers[unit] = KINDS[k % len(KINDS)](numbers[unit], random, tensor.dtype)
    return tensor.copy_(torch.from_numpy(numbers))


def numpy(tensor: Tensor) -> Any:
    name = str(tensor.dtype).removeprefix("torch.")
    wide = torch.float64 if name == "float64" else torch.float32
    return tensor.detach().cpu().to(wide).numpy().copy()


def expected(grad: Tensor, axes: Axes, strength: float = 1.0) -> Any:
    return canonical_order.centralized(numpy(grad), axes, name_of(grad), strength)


def name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def assert_same_bits(found: Tensor, wanted: Any) -> None:
    same_bits.assert_same_bits(numpy(found), wanted)
