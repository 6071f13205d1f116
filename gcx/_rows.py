"""From what a rule says about a parameter to its row of the plan."""

from __future__ import annotations

from math import prod

from gcx._tree import naming
from gcx.layout import LayoutLike, as_layout
from gcx.plan import LeaveAlone, PlanRow

__all__ = ["row", "tied"]


def row(
    name: str, shape: tuple[int, ...], found: LayoutLike | LeaveAlone | None, rule: str
) -> PlanRow:
    """Decide on a parameter about which a layer's rule, of the name `rule`, has said `found`.

    Raises a ValueError that names the parameter if the layout does not fit its rank.
    """
    if found is None:
        found = LeaveAlone(f"left alone by the rule of {rule}")
    if isinstance(found, LeaveAlone):
        return PlanRow(name, shape, None, found.reason)
    layout = as_layout(found)
    with naming(name):
        size = prod(shape[axis] for axis in layout.fan_in_axes(len(shape)))
    if size < 2:
        return PlanRow(name, shape, None, f"fan-in {size}: subtracting its mean would freeze it")
    return PlanRow(name, shape, layout, rule)


def tied(first: PlanRow, second: PlanRow) -> PlanRow:
    """One decision for a parameter of two layers: that of both, or none."""
    if first.layout == second.layout:
        return first
    reason = f"tied, and the rules differ: {first.reason}; {second.reason}"
    return first._replace(layout=None, reason=reason)
