"""Measure the gradients of a JAX model before you train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

    The gradient is without an optimizer's weight decay. It is zero, and shown as such, where the
    loss does not depend on a parameter. The report has the rows of `gcx.optax.plan`.

    Parameters
    ----------
    params : pytree
        The parameters: a dict, an ``nnx.State``, an Equinox module and so on. Leaves that are not
        arrays of floating dtype stay as they are.
    batches : iterable of pytrees of arrays
        Arguments of `loss`; gone through once. A handful is enough.
    loss : callable
        Function of the parameters and a batch that returns one number. `jax.jit` traces it, so it
        must be pure: give it random keys in the batch.
    layouts
        As in `gcx.optax.centralize`.

    Raises
    ------
    TypeError, ValueError
        As `gcx.optax.plan`; if `loss` returns anything but one number, there are no batches, or
        `params` has no floating arrays.

    Examples
    --------
    >>> import jax
    >>> import gcx.diagnostics.jax
    >>> params = {"kernel": jax.numpy.ones((8, 2)), "bias": jax.numpy.zeros(2)}
    >>> def loss(params, batch):
    ...     return ((batch @ params["kernel"] + params["bias"]) ** 2).mean()
    >>> batches = jax.random.uniform(jax.random.key(0), (4, 32, 8))
    >>> report = gcx.diagnostics.jax.energy_removed(params, batches, loss, layouts="flax")
    >>> [row.name for row in report.rows if row.share is not None]
    ['kernel']
    """
    plan = gcx.optax.plan(params, layouts)
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    trained = {k: x for k, x in enumerate(leaves) if hasattr(x, "dtype") and is_floating(x.dtype)}
    if not trained:
        raise ValueError("there is no array of floating dtype in params, and so no gradient")

    @jax.jit
    @jax.grad
    def gradients(trained: Mapping[int, Any], batch: BatchT) -> Any:
        whole = [trained.get(k, leaf) for k, leaf in enumerate(leaves)]
        return loss(jax.tree.unflatten(structure, whole), batch)

    measured = []
    for batch in batches:
        grads = gradients(trained, batch).items()
        measured.append({plan[k].name: energy_of(grad, plan[k]) for k, grad in grads})
    return report_of(plan, measured)
