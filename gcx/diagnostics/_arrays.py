"""The report from given gradients of any array library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gcx._centralize import OUTPUT_FIRST
from gcx._decisions import decide
from gcx._dispatch import backend_for
from gcx._layouts import Layouts, layouts_for
from gcx._names import flatten, naming
from gcx.diagnostics._energy import measure_energies
from gcx.diagnostics._report import EnergyReport, make_report
from gcx.layout import Layout
from gcx.plan import LeaveAlone, PlanRow

__all__ = ["energy_removed"]


def energy_removed(
    grads: Iterable[Any],
    /,
    *,
    layouts: Layouts = OUTPUT_FIRST,
) -> EnergyReport:
    r"""Measure the share of the gradients' energy that Gradient Centralization removes.

    An output unit with fan-in :math:`M` and a gradient :math:`g` of mean :math:`\mu` has the energy
    :math:`\lVert g \rVert^2`. Centralizing removes :math:`M \mu^2` of it (Proposition 4.2). The
    share of a weight is the removed energy of all its output units, divided by their energy.

    Parameters
    ----------
    grads : iterable of list, tuple or dict of arrays
        For each batch its gradients, as in `gcx.centralize_many`; None for no gradient. A generator
        saves memory: it is read once, batch by batch.
    layouts : Layout, str, Plan, mapping or sequence, optional
        As in `gcx.centralize_many`.

    Returns
    -------
    EnergyReport
        One row per array, in the order of the first batch.

    Raises
    ------
    TypeError
        If the gradients of a batch are not a list, tuple or dict of dense floating arrays.
    ValueError
        If there are no batches, or no gradients in them; if `layouts` does not fit the gradients;
        or if the shape of a gradient changes from batch to batch.

    See Also
    --------
    gcx.diagnostics.torch.energy_removed : the same for a torch model and its batches.
    gcx.diagnostics.jax.energy_removed : the same for a JAX model.

    Notes
    -----
    Sums are in float64, for every dtype and library. A DTensor is gathered on each process, so all
    processes have to call this function.

    References
    ----------
    Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
    ECCV 2020, Proposition 4.2. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import numpy as np
    >>> import gcx.diagnostics
    >>> rng = np.random.default_rng(0)
    >>> batches = [
    ...     {"kernel": rng.random((50, 4)) - 0.25, "noise": rng.standard_normal((50, 400))}
    ...     for _ in range(3)
    ... ]
    >>> print(gcx.diagnostics.energy_removed(batches, layouts="...o"))
    parameter       shape   layout  removed      in batches  by chance  reason
    kernel          50x4    ...o      48.7%  47.9% to 49.3%         2%  as given
    noise           50x400  ...o      2.08%  1.99% to 2.16%         2%  as given
    whole gradient                    2.16%  2.07% to 2.24%         2%
    2 of 2 parameters centralized, 3 batches
    """
    plan: dict[str, PlanRow] = {}
    batches = []
    for tree in grads:
        found = _decide_batch(tree, layouts)
        for row, _ in found:
            plan[row.name] = _merge_rows(plan.get(row.name, row), row)
        batches.append(measure_energies(found))
    return make_report(plan.values(), batches)


def _decide_batch(tree: Any, layouts: Any) -> list[tuple[PlanRow, Any]]:
    """Decide on each gradient of a batch."""
    if not isinstance(tree, (list, tuple, dict)):
        msg = (
            "grads has a list, tuple or dict of arrays for each batch, but there is a "
            f"{type(tree).__name__} among them (for a single batch, pass [grads])"
        )
        raise TypeError(msg)
    named = flatten(tree)
    chosen = layouts_for(named, layouts, like=tree)
    return [
        (_decide(name, grad, layout), grad)
        for (name, grad), layout in zip(named, chosen, strict=True)
    ]


_ABSENT = "no gradient"
_LEFT_ALONE = LeaveAlone("left alone by layouts")


def _decide(name: str, grad: Any, layout: Layout | None) -> PlanRow:
    if grad is None:
        return PlanRow(name, (), None, _ABSENT)
    with naming(name):
        backend_for(grad)  # raises a TypeError for anything but an array
    return decide(name, tuple(grad.shape), layout or _LEFT_ALONE, "as given")


def _merge_rows(known: PlanRow, found: PlanRow) -> PlanRow:
    """Merge the rows of a parameter in two batches; one batch may have no gradient for it."""
    if found.reason == _ABSENT:
        return known
    if known.reason != _ABSENT and known.shape != found.shape:
        msg = f"{found.name} has shape {known.shape} in one batch, and {found.shape} in another"
        raise ValueError(msg)
    return found
