"""The gradients of weights: which there are, and their centralization where they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gcx.torch._plan import Weight

_DENSE = torch.strided

# Factor of the weight that an optimizer adds to its gradient, if it does.
Rate = float | Tensor | None


def with_gradient(weights: Iterable[Weight]) -> list[tuple[Weight, Tensor]]:
    """List the weights that have a gradient, with that.

    Raises a TypeError if the mean of one cannot be taken, or not as reproducibly as it should.
    """
    found = [(w, grad) for w in weights if (grad := w.parameter.grad) is not None]
    for weight, grad in found:
        if grad.layout is not _DENSE:
            msg = (
                f"{weight.name} has a gradient of layout {grad.layout}, which has no mean over the "
                "fan-in; make it dense (sparse=False), or use where='update'"
            )
            raise TypeError(msg)
        if weight.reproducible:
            weight.check(grad)
    return found


def centralize_gradient(weight: Weight, rate: Rate) -> None:
    """Centralize a gradient to which the optimizer adds `rate` times the weight, if not None."""
    parameter = weight.parameter
    grad = parameter.grad
    assert grad is not None
    if 0 in grad.stride():  # expanded: several elements in one place
        grad = parameter.grad = grad.contiguous()
    mean = weight.mean(grad)
    if rate is not None:
        mean = mean + rate * weight.mean(parameter)
    weight.fan_in.subtract_(grad, mean)
