"""The effect of Gradient Centralization on a JAX model, before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax

import gcx.optax
from gcx.backends._jax import is_floating
from gcx.diagnostics._energy import measure_energies
from gcx.diagnostics._report import EnergyReport, make_report
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
    """Measure the share of the gradient's energy that GC removes, for each weight of a model.

    Parameters
    ----------
    params : pytree
        The parameters: a dict, an ``nnx.State``, an Equinox module and so on. Other leaves than
        floating arrays are not trained.
    batches : iterable of pytrees of arrays
        Batches for `loss`, read once. A handful is enough.
    loss : callable
        Function of the parameters and a batch that returns the loss, one number. `jax.jit` traces
        it, so it must be pure; for random numbers, put a key into the batch.
    layouts : model, mapping, callable or str
        As in `gcx.optax.centralize`: an nnx or Equinox model, the result of `gcx.optax.layouts`, a
        mapping, or a preset such as ``"flax"``.

    Returns
    -------
    EnergyReport
        One row per leaf of `params`, in the order of `gcx.optax.plan`.

    Raises
    ------
    TypeError
        If `loss` returns anything but one number; or as in `gcx.optax.plan`.
    ValueError
        If there are no batches, or no floating arrays in `params`; or as in `gcx.optax.plan`.

    See Also
    --------
    gcx.diagnostics.energy_removed : the same for given gradients.

    Notes
    -----
    The gradient of the loss is measured, without the weight decay that an optimizer may add. In JAX
    a parameter that the loss does not depend on has a zero gradient.

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
        return _check_loss(loss(jax.tree.unflatten(structure, whole), batch))

    rows = [plan[place] for place in places]
    trained = [leaves[place] for place in places]
    measured = [
        measure_energies(zip(rows, gradients(trained, batch), strict=True)) for batch in batches
    ]
    return make_report(plan, measured)


def _is_trained(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and is_floating(leaf.dtype)


def _check_loss(loss: Any) -> Any:
    if getattr(loss, "shape", None) != ():
        what = f"an array of shape {loss.shape}" if hasattr(loss, "shape") else repr(loss)
        msg = f"loss(params, batch) must return one number, without axes; not {what}"
        raise TypeError(msg)
    return loss
