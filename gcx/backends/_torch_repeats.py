"""PyTorch on CUDA: a list in the form of an earlier one is launched without further checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcx.backends import _torch, _torch_cuda
from gcx.backends._torch_cuda import Centralization, find_launches, forms, is_traced, pick, recall
from gcx.backends._torch_dtensor import PLAIN
from gcx.backends.cuda.walks import Axes


class _Known(NamedTuple):
    """The answers to a call of `gcx.centralize_many`, for all lists in the same form."""

    layouts: object  # no other object has its id while it is here
    places: list[int]  # of the gradients that have a fan-in
    axes: Sequence[Axes]  # of these
    launches: Centralization


def remember(grads: Sequence[Tensor], question: tuple[Any, ...], axes: Sequence[Axes]) -> None:
    """Keep the fan-in axes of a list; the question is that of `gcx._repeats.Call`."""
    layouts, reproducible, is_in_place, _ = question
    if not all(map(_is_ordinary, grads)) or is_traced():
        return
    places = [k for k, fan_in in enumerate(axes) if fan_in]
    chosen, fan_ins = pick(places, grads), pick(places, axes)
    outs = chosen if is_in_place else [None] * len(places)
    launches = find_launches(chosen, fan_ins, outs, (), reproducible)
    if launches.is_whole:
        known = _Known(layouts, places, fan_ins, launches)
        recall((id(layouts), *question[1:], *forms(grads)), lambda: known)


def _is_ordinary(x: Tensor) -> bool:
    """Return True if the form of a tensor shows all that is checked; a list may hold anything."""
    return type(x) in PLAIN and x.layout is torch.strided and _torch.is_for_kernels(x)


def repeat(
    grads: Sequence[Tensor], question: tuple[Any, ...], strength: float
) -> list[Tensor] | None:
    """Centralize a list if a call of `remember` has the answers; else return None."""
    if not {*map(type, grads)}.issubset(PLAIN) or is_traced():
        return None
    layouts, reproducible, is_in_place, _ = question
    known: _Known | None = _torch_cuda.recent.get((id(layouts), *question[1:], *forms(grads)))
    if known is None:
        return None
    chosen = pick(known.places, grads)
    outs = chosen if is_in_place else [None] * len(chosen)
    done = known.launches.run(chosen, strength, outs)
    left = [n for n, result in enumerate(done) if result is None]
    if len(left) == len(done):
        return None
    for n in left:
        k = known.places[n]
        done[n] = _torch.centralize(grads[k], known.axes[n], strength, outs[n], reproducible)
    results: list[Any] = [*grads]
    for k, result in zip(known.places, done, strict=True):
        results[k] = result
    return results
