"""Gradients centralized now, by a call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gcx.torch._gradients import with_gradient
from gcx.torch._overrides import Overrides
from gcx.torch._plan import Layers, Weight, decide, weights_of
from gcx.torch._together import Together
from gcx.torch._untraced import untraced


@untraced
@torch.no_grad()
def centralize_grads_(
    model: nn.Module,
    *,
    layers: Layers = "all",
    overrides: Overrides | None = None,
    reproducible: bool = False,
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
    reproducible : bool, optional
        Whether means are taken in the one order that gives equal bits on every device, whatever
        the strides: see :doc:`/reproducible`.

    Raises
    ------
    TypeError
        If `model` is not a module, or the gradient of a weight to centralize is sparse; if a
        weight has a dtype, a device or shards for which `reproducible` cannot be promised.
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
    decisions = decide(model, layers, overrides).items()
    centralize_gradients(weights_of(decisions, reproducible=reproducible), Together())


def centralize_gradients(weights: Iterable[Weight], together: Together) -> None:
    """Centralize what gradients there are; a ValueError if there are none."""
    found = with_gradient(weights)
    if not found:
        msg = "there is no gradient to centralize; call backward() first, and see gcx.torch.plan"
        raise ValueError(msg)
    together.centralize_({None: found})
