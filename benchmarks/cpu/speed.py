"""Time of gcx beside the obvious expression and installed peers, on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import gcx
from benchmarks.throughput.timing import interleaved

__all__ = ["FAN_IN", "LAYOUT", "SIZES", "Speed", "random", "speeds"]

Candidates = dict[str, Callable[[], object]]

# Name, shape, seconds of rounds, calls a sample.
SIZES = (
    ("16 KB", (64, 64), 1.0, 100),
    ("37 KB", (64, 7 * 7 * 3), 1.0, 50),
    ("1 MB", (512, 512), 1.5, 5),
    ("1 MB", (64, 4096), 1.5, 5),
    ("9 MB", (512, 512 * 3 * 3), 1.5, 2),
    ("64 MB", (4096, 4096), 3.0, 1),
    ("64 MB", (16384, 1024), 3.0, 1),
)
FAN_IN = {"trailing": 1, "leading": 0}
LAYOUT = {"trailing": "o...", "leading": "...o"}


class Speed(NamedTuple):
    """One comparison."""

    library: str
    what: str
    size: str
    shape: tuple[int, int]
    fan_in: str
    gcx: float  # seconds
    others: dict[str, float]  # seconds, by name

    def ratio(self, name: str) -> float:
        """Time of gcx over that of another, below 1 where gcx is faster."""
        return self.gcx / self.others[name]


def speeds(library: str, *, brief: bool = False) -> Iterator[Speed]:
    """Compare on all sizes, or on the smallest alone."""
    for size, shape, seconds, repeats in SIZES[: 1 if brief else None]:
        for fan_in, axis in FAN_IN.items():
            oriented = shape if axis else shape[::-1]
            for what, candidates in _CANDIDATES[library](oriented, fan_in, axis).items():
                times = interleaved(candidates, seconds=seconds, repeats=repeats)
                mine = times.pop("gcx")
                yield Speed(library, what, size, oriented, fan_in, mine, times)


def random(shape: tuple[int, int]) -> Any:
    """Draw standard normal numbers."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _numpy(shape: tuple[int, int], fan_in: str, axis: int) -> dict[str, Candidates]:
    grad, layout = random(shape), gcx.Layout(LAYOUT[fan_in])

    def expression_in_place() -> None:
        grad.__isub__(grad.mean(axis, keepdims=True))

    return {
        "in place": {
            "gcx": lambda: gcx.centralize(grad, layout=layout, out=grad),
            "expression": expression_in_place,
        },
        "new array": {
            "gcx": lambda: gcx.centralize(grad, layout=layout),
            "expression": lambda: grad - grad.mean(axis, keepdims=True),
        },
    }


def _torch(shape: tuple[int, int], fan_in: str, axis: int) -> dict[str, Candidates]:
    import torch

    torch.set_num_threads(1)
    grad, layout = torch.from_numpy(random(shape)), gcx.Layout(LAYOUT[fan_in])
    in_place: Candidates = {
        "gcx": lambda: gcx.centralize(grad, layout=layout, out=grad),
        "expression": lambda: grad.sub_(grad.mean(axis, keepdim=True)),
        "add_(-mean)": lambda: grad.add_(-grad.mean(axis, keepdim=True)),
    }
    if fan_in == "trailing":  # the only axes that peer knows
        from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient

        in_place["pytorch_optimizer"] = lambda: centralize_gradient(grad)
    return {
        "in place": in_place,
        "new array": {
            "gcx": lambda: gcx.centralize(grad, layout=layout),
            "expression": lambda: grad - grad.mean(axis, keepdim=True),
        },
        **_narrow_torch(grad, layout, axis),
    }


def _narrow_torch(wide: Any, layout: gcx.Layout, axis: int) -> dict[str, Candidates]:
    """Compare in bfloat16 and float16, lists included; the expression rounds the mean too."""
    import torch

    def compared(dtype: torch.dtype) -> dict[str, Candidates]:
        grad, name = wide.to(dtype), str(dtype).removeprefix("torch.")
        return {
            f"in place, {name}": {
                "gcx": lambda: gcx.centralize(grad, layout=layout, out=grad),
                "expression": lambda: grad.sub_(grad.mean(axis, keepdim=True)),
            },
            f"list of 2 new arrays, {name}": {
                "gcx": lambda: gcx.centralize_many([grad, grad], layouts=layout),
                "expression": lambda: [g - g.mean(axis, keepdim=True) for g in (grad, grad)],
            },
        }

    return {**compared(torch.bfloat16), **compared(torch.float16)}


def _jax(shape: tuple[int, int], fan_in: str, axis: int) -> dict[str, Candidates]:
    import jax
    import optax

    grad, layout = jax.numpy.asarray(random(shape)), gcx.Layout(LAYOUT[fan_in])

    def expression(g: Any) -> Any:
        return g - g.mean(axis, keepdims=True)

    def operator(g: Any) -> Any:
        return gcx.centralize(g, layout=layout)

    def peer(g: Any) -> Any:
        return optax.centralize().update(g, optax.EmptyState())[0]

    def waited(call: Callable[[Any], Any]) -> Callable[[], object]:
        return lambda: call(grad).block_until_ready()

    # The only axes that the peer knows are the trailing ones.
    peers = {"optax.centralize": waited(jax.jit(peer))} if fan_in == "trailing" else {}
    return {
        "eager": {"gcx": waited(operator), "expression": waited(expression)},
        "inside jit": {
            "gcx": waited(jax.jit(operator)),
            "expression": waited(jax.jit(expression)),
            **peers,
        },
    }


_CANDIDATES = {"numpy": _numpy, "torch": _torch, "jax": _jax}
