"""From what the rule of a layer says of a parameter to what happens to that parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gcx._rules import Answer
from gcx.layout import Layout, as_layout
from gcx.plan import LeaveAlone

Shape = tuple[int, ...]


class Kernel(NamedTuple):
    """Answer of a rule that knows the shape of its layer's weight too.

    Attributes
    ----------
    layout : str
        Of the weight of a single layer.
    shape : tuple of int
        Of that weight. Where layers are stacked, it shows which axes are those of the stack.
    """

    layout: str
    shape: Shape


KernelAnswer = Answer | Kernel
Answers = Mapping[str, KernelAnswer]


class Decision(NamedTuple):
    """What happens to one parameter: centralized in `layout`, or left alone if that is None."""

    layout: Layout | None
    reason: str


# Reasons that several frameworks share, besides those of gcx._rules.
SLOPE = LeaveAlone("slope of an activation")
LENGTH = LeaveAlone("weight norm: the length of a weight")


def settle(answer: KernelAnswer, rule: str, shape: Shape, own_shape: Shape | None) -> Decision:
    """Decide on a parameter of `shape`.

    Parameters
    ----------
    answer : Layout, str, Kernel, LeaveAlone or None
        What the rule said.
    rule : str
        Its name.
    shape : tuple of int
        As the optimizer sees the parameter: with the axes of a stack of layers.
    own_shape : tuple of int or None
        As the layer itself sees it, where that is known.
    """
    if isinstance(answer, Kernel):
        answer, own_shape = answer
    if answer is None:
        return Decision(None, f"left alone by the rule of {rule}")
    if isinstance(answer, LeaveAlone):
        return Decision(None, answer.reason)
    layout = as_layout(answer)
    if own_shape is None:
        return Decision(_led_by_stack(layout, len(shape)), rule)
    stacked = _with_stack(layout, own_shape, shape)
    if stacked is None:
        reason = f"unknown: the shape is {shape}, where a {rule} has {own_shape}"
        return Decision(None, reason)
    return Decision(stacked, rule)


def merge(first: Decision, second: Decision) -> Decision:
    """Make one decision on a parameter that two layers share."""
    if first.layout == second.layout:
        return first
    reason = f"tied, and the rules differ: {first.reason}; {second.reason}"
    return Decision(None, reason)


def _led_by_stack(layout: Layout, ndim: int) -> Layout:
    """Keep the axes in front that are more than the layout names: `vmap` and `scan` put them there.

    >>> _led_by_stack(Layout("io"), 3)
    Layout('oio')
    """
    text = str(layout)
    return layout if "..." in text else Layout("b" * (ndim - len(text)) + text)


def _with_stack(layout: Layout, own_shape: Shape, shape: Shape) -> Layout | None:
    """Keep the axes that the layer itself does not have, wherever they are; None if none fit.

    >>> _with_stack(Layout("...o"), (3, 8, 4), (3, 6, 8, 4))
    Layout('ioio')
    """
    if shape == own_shape:
        return layout
    fan_in = layout.fan_in_axes(len(own_shape))
    letters = "".join("i" if axis in fan_in else "o" for axis in range(len(own_shape)))
    more = len(shape) - len(own_shape)
    for k in range(len(own_shape) + 1 if more > 0 else 0):
        if shape[:k] + shape[k + more :] == own_shape:
            return Layout(letters[:k] + "b" * more + letters[k:])
    return None
