"""What the canonical order of summation costs: ``reproducible=True`` beside the default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import gcx
from benchmarks.cpu.speed import FAN_IN, LAYOUT, SIZES, random
from benchmarks.throughput.timing import interleaved

__all__ = ["Cost", "costs"]

_Operator = Callable[..., Any]
# Ways to call an operator, by name.
_Calls = dict[str, Callable[[_Operator], Callable[[], object]]]


class Cost(NamedTuple):
    """One comparison, in seconds."""

    library: str
    what: str
    size: str
    shape: tuple[int, int]
    fan_in: str
    default: float
    reproducible: float


def costs(library: str, *, brief: bool = False) -> Iterator[Cost]:
    """Compare on all sizes, or on the smallest alone."""
    sizes = SIZES[: 1 if brief else None]
    for (size, shape, seconds, repeats), fan_in in product(sizes, FAN_IN):
        oriented = shape if FAN_IN[fan_in] else shape[::-1]
        default = partial(gcx.centralize, layout=gcx.Layout(LAYOUT[fan_in]))
        operators = {"default": default, "reproducible": partial(default, reproducible=True)}
        for what, call in _CALLS[library](random(oriented)).items():
            candidates = {name: call(operator) for name, operator in operators.items()}
            times = interleaved(candidates, seconds=seconds, repeats=repeats)
            yield Cost(library, what, size, oriented, fan_in, **times)


def _numpy(values: Any) -> _Calls:
    return {
        "in place": lambda operator: lambda: operator(values, out=values),
        "new array": lambda operator: lambda: operator(values),
    }


def _torch(values: Any) -> _Calls:
    import torch

    torch.set_num_threads(1)
    return _numpy(torch.from_numpy(values))


def _jax(values: Any) -> _Calls:
    import jax

    grad = jax.numpy.asarray(values)

    def waited(operator: _Operator) -> Callable[[], object]:
        return lambda: operator(grad).block_until_ready()

    return {"eager": waited, "inside jit": lambda operator: waited(jax.jit(operator))}


_CALLS = {"numpy": _numpy, "torch": _torch, "jax": _jax}
