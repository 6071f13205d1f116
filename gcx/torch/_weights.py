"""The weights to centralize, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from gcx._memory import find_shared
from gcx._names import naming
from gcx.backends import _torch
from gcx.torch._plan import Decision

# Factor of the weight that an optimizer adds to its gradient; None if it adds nothing.
Rate = float | Tensor | None


class Weight(NamedTuple):
    """A parameter to centralize, with its name in the model."""

    name: str
    parameter: Tensor
    fan_in: _torch.FanIn
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


_PLAIN = (Tensor, torch.nn.Parameter)
_NBYTES = attrgetter("nbytes")

Gradients = Sequence[tuple[Weight, Tensor]]


def with_gradient(weights: Iterable[Weight]) -> list[tuple[Weight, Tensor]]:
    """List the weights that have a gradient, each with its gradient.

    Raises a TypeError if a gradient has no mean, or none with the bits that were promised.
    """
    found = [(w, grad) for w in weights if (grad := w.parameter.grad) is not None]
    for weight, grad in found:
        if grad.layout is not torch.strided:
            msg = (
                f"{weight.name} has a gradient of layout {grad.layout}, which has no mean over the "
                "fan-in; make it dense (sparse=False), or use where='update'"
            )
            raise TypeError(msg)
        if weight.reproducible:
            weight.check(grad)
    return found


def part_gradients(
    find_weights: Callable[[], Iterable[Weight]], groups: Iterable[Iterable[Tensor]]
) -> None:
    """Copy the gradient of a weight if it shares memory with the gradient of another parameter."""
    found = [
        (p, grad)
        for parameters in groups
        for p in parameters
        if (grad := p.grad) is not None and type(grad) in _PLAIN and grad.layout is torch.strided
    ]
    grads = [*map(itemgetter(1), found)]
    starts = [*map(Tensor.data_ptr, grads)]
    if all(map(Tensor.is_contiguous, grads)) and not _torch.overlap(starts, map(_NBYTES, grads)):
        return
    uses = [(_torch.find_memory(grad), k, True) for k, grad in enumerate(grads)]
    shared = {found[k] for pair in find_shared(uses) for k in pair}
    marked = {weight.parameter for weight in find_weights()} if shared else ()
    for parameter, grad in shared:
        if parameter in marked:
            parameter.grad = grad.clone()


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
