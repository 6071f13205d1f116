"""The gradients of weights, centralized where they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gcx.torch._overrides import Overrides
from gcx.torch._plan import Layers, Weight, decide
from gcx.torch._untraced import untraced


@untraced
@torch.no_grad()
def centralize_grads_(
    model: nn.Module, *, layers: Layers = "all", overrides: Overrides | None = None
) -> None:
    """Centralize the gradients of a model now, in place in ``.grad``.

    For loops that need centralized gradients before the step, such as to clip their norm; where
    nothing comes between, `centralize` does it for an optimizer once and for all. Both together are
    right too: the step centralizes again, which changes nothing, and includes weight decay. Where
    that has overrides or switches, call ``centralize_grads_()`` of its handle, which has the same.

    Parameters
    ----------
    model : torch.nn.Module
        The model, after ``backward()``. Parameters without gradient are passed over.
    layers, overrides
        As in `plan`, which shows what is centralized.

    Raises
    ------
    TypeError
        If `model` is not a module, or the gradient of a weight to centralize is sparse.
    ValueError
        As `plan`; or if there is no gradient to centralize.
    RuntimeError
        As `plan`.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> model(torch.rand(8, 3)).square().sum().backward()
    >>> gcx.torch.centralize_grads_(model)
    >>> bool(model.weight.grad.sum(1).abs().max() < 1e-5)
    True
    >>> norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    """
    found = decide(model, layers, overrides).items()
    centralize_gradients(Weight(d.name, p, d.fan_in) for p, d in found if d.fan_in is not None)


def centralize_gradients(weights: Iterable[Weight]) -> None:
    """Centralize what gradients there are; a ValueError if there are none."""
    found = [weight for weight in weights if has_gradient(weight)]
    if not found:
        msg = "there is no gradient to centralize; call backward() first, and see gcx.torch.plan"
        raise ValueError(msg)
    for weight in found:
        centralize_gradient(weight, None)


def has_gradient(weight: Weight) -> bool:
    """Whether a weight has a gradient; raises a TypeError if that is not dense."""
    grad = weight.parameter.grad
    if grad is not None and grad.layout is not torch.strided:
        msg = (
            f"{weight.name} has a gradient of layout {grad.layout}, which has no mean over the "
            "fan-in; make it dense (sparse=False), or use where='update'"
        )
        raise TypeError(msg)
    return grad is not None


def centralize_gradient(weight: Weight, rate: float | Tensor | None) -> None:
    """Centralize a gradient to which the optimizer adds `rate` times the weight, if not None."""
    _, parameter, fan_in = weight
    grad = parameter.grad
    assert grad is not None
    if 0 in grad.stride():  # expanded: several elements in one place
        grad = parameter.grad = grad.contiguous()
    mean = fan_in.mean(grad)
    if rate is not None:
        mean = mean + rate * fan_in.mean(parameter)
    fan_in.subtract_(grad, mean)
