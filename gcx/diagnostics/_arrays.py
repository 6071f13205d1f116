"""The report from gradients that are there already, of any array library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gcx._centralize import OUTPUT_FIRST
from gcx._decisions import decide
from gcx._dispatch import backend_for
from gcx._layouts import Layouts, layouts_for
from gcx._names import flatten, naming
from gcx.diagnostics._energy import energy_of
from gcx.diagnostics._report import EnergyReport, report_of
from gcx.layout import Layout
from gcx.plan import LeaveAlone, PlanRow

__all__ = ["energy_removed"]


def energy_removed(
    grads: Iterable[Any],
    /,
    *,
    layouts: Layouts = OUTPUT_FIRST,
) -> EnergyReport:
    r"""Measure what share of the energy of gradients Gradient Centralization would remove.

    The energy of the gradient :math:`g` of an output unit with fan-in :math:`M` and mean
    :math:`\mu` is :math:`\lVert g \rVert^2`, and centralizing it removes :math:`M \mu^2`
    (Proposition 4.2). The share of a weight is the sum of the one over its output units, divided by
    the sum of the other.

    Parameters
    ----------
    grads : iterable of list, tuple or dict of arrays
        For each batch the gradients, as `gcx.centralize_many` takes them; None where there is no
        gradient. A generator will do: they are looked at one batch at a time.
    layouts : Layout, str, mapping or sequence, optional
        As in `gcx.centralize_many`.

    Returns
    -------
    EnergyReport
        One row per array, in the order of the first batch.

    Raises
    ------
    TypeError
        If the gradients of a batch are not a list, tuple or dict, or one of them is not a dense
        array of floating dtype.
    ValueError
        If there are no batches, or no gradients in them; if `layouts` does not fit the gradients;
        or if the shape of one changes from batch to batch.

    See Also
    --------
    gcx.diagnostics.torch.energy_removed : for a model of torch; it computes the gradients.
    gcx.diagnostics.jax.energy_removed : the same in JAX.

    Notes
    -----
    Sums are taken in float64 for every dtype and in every library. A DTensor of torch is put
    together on each process, which all have to call this.

    References
    ----------
    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, Proposition 4.2. https://arxiv.org/abs/2004.01461

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
        found = _rows_and_grads(tree, layouts)
        for row, _ in found:
            plan[row.name] = _agreed(plan.get(row.name, row), row)
        batches.append({row.name: energy_of(g, row) for row, g in found if g is not None})
    return report_of(plan.values(), batches)


def _rows_and_grads(tree: Any, layouts: Any) -> list[tuple[PlanRow, Any]]:
    """Decide on each of the gradients of a batch."""
    if not isinstance(tree, (list, tuple, dict)):
        msg = (
            "grads has the gradients of each batch, a list, tuple or dict of arrays; there is "
            f"{type(tree).__name__} where one of these should be (of a single batch: [grads])"
        )
        raise TypeError(msg)
    named = flatten(tree)
    chosen = layouts_for(named, layouts, like=tree)
    return [
        (_row(name, grad, layout), grad) for (name, grad), layout in zip(named, chosen, strict=True)
    ]


_ABSENT = "no gradient"
_LEFT_ALONE = LeaveAlone("left alone by layouts")


def _row(name: str, grad: Any, layout: Layout | None) -> PlanRow:
    if grad is None:
        return PlanRow(name, (), None, _ABSENT)
    with naming(name):
        backend_for(grad)  # which says what is no array
    return decide(name, tuple(grad.shape), layout or _LEFT_ALONE, "as given")


def _agreed(known: PlanRow, found: PlanRow) -> PlanRow:
    """One row for the gradients of a parameter in two batches, of which one may have none."""
    if found.reason == _ABSENT:
        return known
    if known.reason != _ABSENT and known.shape != found.shape:
        msg = f"{found.name} has shape {known.shape} in one batch, and {found.shape} in another"
        raise ValueError(msg)
    return found
