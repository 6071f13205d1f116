"""The weights to centralize, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from gcx._memory import find_shared, overlap
from gcx._names import naming
from gcx.backends import _torch
from gcx.backends._torch_dtensor import PLAIN, FanIn
from gcx.backends._torch_memory import count_bytes, find_memory
from gcx.torch._plan import Decision

# Factor of the weight that an optimizer adds to its gradient; None if it adds nothing.
Rate = float | Tensor | None


class Weight(NamedTuple):
    """A parameter to centralize, with its name in the model."""

    name: str
    parameter: Tensor
    fan_in: FanIn
    reproducible: bool = False

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor of the shape of the parameter over the fan-in, in float32 at least."""
        return _torch.mean_over(tensor, self.fan_in, self.reproducible)

    def subtract_(self, tensor: Tensor, mean: Tensor) -> None:
        """Subtract in place a mean that `mean` returned."""
        _torch.subtract_mean_(tensor, mean, self.fan_in)

    def check(self, tensor: Tensor) -> None:
        """Raise a TypeError that names the weight if the bits of a mean cannot be promised."""
        if self.reproducible:
            with naming(self.name):
                _torch.check_reproducible_over(tensor, self.fan_in)


def weights_of(
    decisions: Iterable[tuple[Tensor, Decision]], *, reproducible: bool
) -> Iterator[Weight]:
    """List the parameters to centralize; a TypeError if promised bits cannot be kept."""
    for parameter, decision in decisions:
        row = decision.row
        if row.layout is not None:
            weight = Weight(row.name, parameter, row.layout.split(row.shape), reproducible)
            weight.check(parameter)
            yield weight


Gradients = Sequence[tuple[Weight, Tensor]]

_DENSE = torch.strided
_PARAMETER: Callable[[Weight], Tensor] = attrgetter("parameter")
_NBYTES: Callable[[Tensor], int] = attrgetter("nbytes")


def with_gradient(weights: Iterable[Weight]) -> list[tuple[Weight, Tensor]]:
    """List the weights that have a gradient, each with its gradient.

    Raises a TypeError if a gradient has no mean, or none with the bits that were promised.
    """
    found = [(w, grad) for w in weights if (grad := w.parameter.grad) is not None]
    for weight, grad in found:
        if grad.layout is not _DENSE:
            raise TypeError(
                f"{weight.name} has a gradient of layout {grad.layout}, which has no mean over the "
                "fan-in; make it dense (sparse=False), or use where='update'"
            )
        if weight.reproducible:
            weight.check(grad)
    return found


def part_gradients(weights: Iterable[Weight], parameters: Iterable[Tensor]) -> None:
    """Copy the gradient of a weight if it shares memory with another gradient, or a parameter."""
    marked = [*map(_PARAMETER, weights)]
    if _are_apart([grad for p in parameters if (grad := p.grad) is not None], marked):
        return
    dense = [(p, g) for p in parameters if (g := p.grad) is not None and g.layout is _DENSE]
    uses = [(find_memory(grad), k, True) for k, (_, grad) in enumerate(dense)]
    uses += [(find_memory(p), -1, False) for p in parameters if p.layout is _DENSE]
    shared = {dense[k] for pair in find_shared(uses) for k in pair if k >= 0}
    for parameter, grad in shared.intersection((p, p.grad) for p in marked):
        parameter.grad = grad.clone()


def _are_apart(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Return True if plain gradients begin far enough apart, and none where a weight does."""
    if not {*map(type, grads)}.issubset(PLAIN):
        return False
    try:
        starts = [*map(Tensor.data_ptr, grads)]
    except RuntimeError:  # one is sparse
        return False
    places = {*starts}
    if len(places) < len(starts) or not places.isdisjoint(map(Tensor.data_ptr, weights)):
        return False
    # Those that begin apart and overlap are parts of one storage.
    if not any(map(Tensor.storage_offset, grads)):
        return True
    count = _NBYTES if all(map(Tensor.is_contiguous, grads)) else count_bytes
    return not overlap(starts, map(count, grads))


def centralize_(gradients: Gradients, rate: Rate = None, strength: float = 1.0) -> None:
    """Centralize gradients to which the optimizer adds `rate` times the weight, in one call."""
    if not gradients:
        return
    weights, found = zip(*gradients, strict=True)
    grads = [*found]
    for k, grad in enumerate(found):
        if not grad.is_contiguous() and 0 in grad.stride():  # elements share memory
            grads[k] = weights[k].parameter.grad = grad.contiguous()
    _torch.subtract_means_(
        grads,
        [weight.fan_in for weight in weights],
        [weight.parameter for weight in weights],
        rate,
        strength=strength,
        reproducible=weights[0].reproducible,
    )
