"""Measure gradients: their energy, and the part that Gradient Centralization removes."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, nan
from typing import Any

from gcx import _compat
from gcx._centralize import OUTPUT_FIRST
from gcx._decisions import decide_row
from gcx._dispatch import backend_for
from gcx._means import fan_in_mean
from gcx._names import Layouts, flatten, layouts_for, naming
from gcx.diagnostics._report import Energy, EnergyReport, fan_in_size, report_of
from gcx.layout import Layout
from gcx.plan import LeaveAlone, PlanRow

_ABSENT = "no gradient"
_LEFT_ALONE = LeaveAlone("left alone by layouts")


def energy_removed(grads: Iterable[Any], /, *, layouts: Layouts = OUTPUT_FIRST) -> EnergyReport:
    r"""Measure what share of the energy of gradients Gradient Centralization would remove.

    The energy of the gradient :math:`g` of an output unit with fan-in :math:`M` and mean
    :math:`\mu` is :math:`\lVert g \rVert^2`, and centralizing it removes :math:`M \mu^2`
    (Proposition 4.2). The share of a weight is the energy removed from all of its output units,
    divided by their energy. Sums are in float64 for every dtype. The report has one row per array,
    in the order of the first batch.

    Parameters
    ----------
    grads : iterable of list, tuple or dict of arrays
        The gradients of each batch, as `gcx.centralize_many` takes them. A generator is enough:
        they are measured one batch at a time. Every process must call this with its DTensors.
    layouts : Layout, str, mapping, sequence or Plan, optional
        As in `gcx.centralize_many`.

    Raises
    ------
    TypeError, ValueError
        If a gradient is not a dense floating array, there is none, or batches or `layouts` differ.

    References
    ----------
    Yong et al., "Gradient Centralization", ECCV 2020. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import numpy as np
    >>> import gcx.diagnostics
    >>> rng = np.random.default_rng(0)
    >>> batches = [{"kernel": rng.random((50, 4)) - 0.25} for _ in range(3)]
    >>> print(gcx.diagnostics.energy_removed(batches, layouts="...o"))
    parameter       shape  layout  removed      in batches  by chance  reason
    kernel          50x4   ...o      48.8%  47.7% to 50.1%         2%  as given
    whole gradient                   48.8%  47.7% to 50.1%         2%
    1 of 1 parameters centralized, 3 batches
    """
    plan: dict[str, PlanRow] = {}
    batches = []
    for tree in grads:
        if not isinstance(tree, (list, tuple, dict)):
            where = "where a list, tuple or dict of arrays should be (of a single batch: [grads])"
            raise TypeError(f"grads is a list of batches; there is {type(tree).__name__} {where}")
        energies = {}
        named = flatten(tree)
        for (name, grad), layout in zip(named, layouts_for(named, layouts, like=tree), strict=True):
            plan[name] = _row(name, grad, layout, plan.get(name))
            if grad is not None:
                energies[name] = energy_of(grad, plan[name])
        batches.append(energies)
    return report_of(plan.values(), batches)


def _row(name: str, grad: Any, layout: Layout | None, known: PlanRow | None) -> PlanRow:
    """Make the row of a gradient; `known` is its row in an earlier batch."""
    if grad is None:
        return known or PlanRow(name, (), None, _ABSENT)
    with naming(name):
        backend_for(grad)  # raises if it is no array
    shape = tuple(grad.shape)
    if known and known.reason != _ABSENT and known.shape != shape:
        raise ValueError(f"{name} has shape {known.shape} in one batch, and {shape} in another")
    return decide_row(name, shape, layout or _LEFT_ALONE, "as given")


def energy_of(grad: Any, row: PlanRow) -> Energy:
    """Measure the gradient of a row's parameter, in float64; an error names the parameter."""
    with naming(row.name):
        backend_for(grad).check_dtype(grad)
    x = _with_float64(grad)
    xp = _compat.array_namespace(x)
    is_complex = "complex" in str(x.dtype)  # isdtype refuses the dtypes of ml_dtypes
    wide = xp.astype(x, xp.complex128 if is_complex else xp.float64)
    total = float(xp.sum(xp.abs(wide) ** 2))
    if row.layout is None:
        return Energy(0.0, total)
    if not isfinite(total):
        return Energy(nan, total)
    means = fan_in_mean(wide, row.layout)
    return Energy(fan_in_size(row) * float(xp.sum(xp.abs(means) ** 2)), total)


def _with_float64(grad: Any) -> Any:
    """Bring a gradient to a place where it is whole, and where its library has float64."""
    if _compat.is_jax_array(grad):
        from gcx.backends import _jax

        return _jax.to_numpy(grad)  # JAX has float64 only if the whole process enables it
    if not _compat.is_torch_array(grad):
        return grad
    from gcx.backends import _torch_dtensor

    tensor = grad.detach()
    if _torch_dtensor.is_dtensor(tensor):  # each process would sum its own part
        tensor = tensor.full_tensor()
    return tensor.cpu() if tensor.device.type == "mps" else tensor
