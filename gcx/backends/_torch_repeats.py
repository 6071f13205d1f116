"""PyTorch on CUDA: a list in the form of an earlier one is launched without further checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcx.backends import _torch
from gcx.backends._torch_cuda import Launches, find_launches, is_traced, pick, recall, remember
from gcx.backends._torch_dtensor import PLAIN
from gcx.backends.cuda.walks import Axes


class _Known(NamedTuple):
    """The answers to a call, for all lists in the same form."""

    layouts: object  # no other object has its id while it is here
    places: list[int]  # of the gradients that have a fan-in
    axes: Sequence[Axes]  # of these
    launches: Launches


class Call:
    """A call of `gcx.centralize_many` with a flat list, tuple or dict, in place or for new results.

    If an earlier call had the same form, nothing has to be checked again.
    """

    def __init__(self, grads: Any, layouts: object, out: Any, reproducible: bool) -> None:
        self._kind = type(grads)
        self._names: tuple[Any, ...] = (*grads,) if self._kind is dict else ()
        self._grads: Sequence[Any] = [*grads.values()] if self._kind is dict else grads
        self._layouts, self._reproducible = layouts, reproducible
        self._is_in_place = out is not None
        # 1 and True are equal, and have other names in a plan.
        names = *map(type, self._names), *self._names
        self._key = id(layouts), reproducible, self._is_in_place, names

    def remember(self, axes: Sequence[Axes]) -> None:
        """Keep the fan-in axes of each gradient for the next call; none for one left alone."""
        if is_traced() or not all(map(_is_ordinary, self._grads)):
            return
        places = [k for k, fan_in in enumerate(axes) if fan_in]
        chosen, fan_ins = pick(places, self._grads), pick(places, axes)
        roles = [chosen, self._find_outs(chosen)]
        launches = find_launches("Store", roles, fan_ins, self._reproducible)
        if launches.is_whole:
            remember(self._key, self._grads, _Known(self._layouts, places, fan_ins, launches))

    def repeat(self, strength: float) -> Any:
        """Centralize the gradients if a call of `remember` has the answers; else return None."""
        known: _Known | None = None if is_traced() else recall(self._key, self._grads)
        if known is None:
            return None
        chosen = pick(known.places, self._grads)
        outs = self._find_outs(chosen)
        done = known.launches.run([chosen, outs], (strength, 0.0))
        left = [n for n, result in enumerate(done) if result is None]
        if len(left) == len(done):
            return None
        for n in left:
            of_one = (chosen[n], known.axes[n], strength, outs[n], self._reproducible)
            done[n] = _torch.centralize(*of_one)
        results: list[Any] = [*self._grads]
        for k, result in zip(known.places, done, strict=True):
            results[k] = result
        if self._kind is dict:
            return dict(zip(self._names, results, strict=True))
        return tuple(results) if self._kind is tuple else results

    def _find_outs(self, chosen: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return chosen if self._is_in_place else [None] * len(chosen)


def _is_ordinary(x: Tensor) -> bool:
    """Return True if the form of a tensor shows all that is checked; a list may hold anything."""
    return type(x) in PLAIN and x.layout is torch.strided and _torch.is_for_kernels(x)
