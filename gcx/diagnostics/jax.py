"""What Gradient Centralization would do to a model in JAX, before it is trained."""

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

    Parameters
    ----------
    params : pytree
        The parameters: of a dict, an ``nnx.State``, an Equinox module and so on. Leaves that are
        not arrays of floating dtype stay as they are.
    batches : iterable of pytrees of arrays
        What `loss` takes; gone through once. A handful will do.
    loss : callable
        Function of the parameters and a batch that returns the loss, one number. It is traced by
        `jax.jit`, so it must be pure; what it draws at random needs a key, in the batch for one.
    layouts : model, mapping, callable or str
        Which axes are fan-in, as `gcx.optax.centralize` takes it: the model itself if it is one of
        nnx or Equinox, what `gcx.optax.layouts` gives, a mapping, or ``"flax"`` and other presets.

    Returns
    -------
    EnergyReport
        One row per leaf of `params`, in the order of `gcx.optax.plan`.

    Raises
    ------
    TypeError
        If `loss` returns anything but one number; or as `gcx.optax.plan`.
    ValueError
        If there are no batches, or no arrays of floating dtype in `params`; or as
        `gcx.optax.plan`.

    See Also
    --------
    gcx.diagnostics.energy_removed : for gradients that are there already.

    Notes
    -----
    It is the gradient of the loss that is measured, without the weight decay that an optimizer may
    add. In JAX the gradient of a parameter that the loss does not depend on is zero, and so the
    table calls it.

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
    places = [k for k, leaf in enumerate(leaves) if _is_trained(leaf)]
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
    measured = [
        {
            row.name: energy_of(grad, row)
            for row, grad in zip(rows, gradients(trained, batch), strict=True)
        }
        for batch in batches
    ]
    return report_of(plan, measured)


def _is_trained(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and is_floating(leaf.dtype)


def _one_number(loss: Any) -> Any:
    if getattr(loss, "shape", None) != ():
        what = f"an array of shape {loss.shape}" if hasattr(loss, "shape") else repr(loss)
        msg = f"loss(params, batch) is to return one number, without axes; not {what}"
        raise TypeError(msg)
    return loss
