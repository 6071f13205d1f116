"""Measure the gradients of a JAX model before you train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax

import gcx.optax
from gcx.backends._jax import is_floating
from gcx.diagnostics._energy import energy_of
from gcx.diagnostics._report import EnergyReport, report_of
from gcx.optax._layouts import Layouts
from gcx.optax._names import is_none

__all__ = ["energy_removed"]

ParamsT = TypeVar("ParamsT")
BatchT = TypeVar("BatchT")


def energy_removed(
    params: ParamsT,
    batches: Iterable[BatchT],
    loss: Callable[[ParamsT, BatchT], Any],
    *,
    layouts: Layouts,
) -> EnergyReport:
    """Measure what share of the gradient's energy GC would remove, in each weight of a model.

    The gradient is that of the loss, without an optimizer's weight decay. It is zero, and shown as
    such, where the loss does not depend on a parameter.

    Parameters
    ----------
    params : pytree
        The parameters: a dict, an ``nnx.State``, an Equinox module and so on. Leaves that are not
        arrays of floating dtype stay as they are.
    batches : iterable of pytrees of arrays
        Arguments of `loss`; gone through once. A handful is enough.
    loss : callable
        Function of the parameters and a batch that returns the loss, one number. `jax.jit` traces
        it, so it must be pure: give it random keys in the batch.
    layouts : model, Plan, mapping, callable or str
        As in `gcx.optax.centralize`.

    Returns
    -------
    EnergyReport
        One row per leaf of `params`, in the order of `gcx.optax.plan`.

    Raises
    ------
    TypeError
        If `loss` returns anything but one number; or as `gcx.optax.plan`.
    ValueError
        If there are no batches, no floating arrays in `params`, or as `gcx.optax.plan`.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import gcx.diagnostics.jax
    >>> params = {"Dense_0": {"kernel": jnp.ones((8, 2)), "bias": jnp.zeros(2)}}
    >>> def loss(params, batch):
    ...     dense = params["Dense_0"]
    ...     return jnp.mean((batch @ dense["kernel"] + dense["bias"] - 1.0) ** 2)
    >>> batches = [jax.random.uniform(jax.random.key(k), (32, 8)) for k in range(4)]
    >>> report = gcx.diagnostics.jax.energy_removed(params, batches, loss, layouts="flax")
    >>> [row.name for row in report.rows if row.share is not None]
    ['Dense_0/kernel']
    """
    plan = gcx.optax.plan(params, layouts)
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    places = [
        k for k, leaf in enumerate(leaves) if hasattr(leaf, "dtype") and is_floating(leaf.dtype)
    ]
    if not places:
        msg = "there is no array of floating dtype in params, and so no gradient"
        raise ValueError(msg)

    @jax.jit
    @jax.grad
    def gradients(trained: Sequence[Any], batch: BatchT) -> Any:
        whole = list(leaves)
        for place, leaf in zip(places, trained, strict=True):
            whole[place] = leaf
        return _one_number(loss(jax.tree.unflatten(structure, whole), batch))

    rows = [plan[place] for place in places]
    trained = [leaves[place] for place in places]
    measured = []
    for batch in batches:
        grads = zip(rows, gradients(trained, batch), strict=True)
        measured.append({row.name: energy_of(grad, row) for row, grad in grads})
    return report_of(plan, measured)


def _one_number(loss: Any) -> Any:
    if getattr(loss, "shape", None) != ():
        what = f"an array of shape {loss.shape}" if hasattr(loss, "shape") else repr(loss)
        msg = f"loss(params, batch) is to return one number, without axes; not {what}"
        raise TypeError(msg)
    return loss
