"""From the answer of a layer's rule to the decision on a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gcx._rules import Answer
from gcx.layout import Layout, as_layout
from gcx.plan import LeaveAlone

Shape = tuple[int, ...]


class Kernel(NamedTuple):
    """Answer of a rule that also knows the shape of its layer's weight.

    Attributes
    ----------
    layout : str
        Layout of the weight in a single layer.
    shape : tuple of int
        Shape of the weight in a single layer. It tells the axes of a stack from the others.
    """

    layout: str
    shape: Shape


KernelAnswer = Answer | Kernel
Answers = Mapping[str, KernelAnswer]


class Decision(NamedTuple):
    """Layout of one parameter (None: left alone), and the reason."""

    layout: Layout | None
    reason: str


# Reasons that several frameworks share.
SLOPE = LeaveAlone("slope of an activation")
LENGTH = LeaveAlone("weight norm: the length of a weight")


def settle(answer: KernelAnswer, rule: str, shape: Shape, own_shape: Shape | None) -> Decision:
    """Decide on a parameter of `shape`.

    Parameters
    ----------
    answer : Layout, str, Kernel, LeaveAlone or None
        Answer of the rule.
    rule : str
        Name of the rule.
    shape : tuple of int
        Shape for the optimizer, with the axes of a stack of layers.
    own_shape : tuple of int or None
        Shape for the layer itself, if known.
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
        reason = f"unknown: the shape is {shape}, but a {rule} has {own_shape}"
        return Decision(None, reason)
    return Decision(stacked, rule)


def merge(first: Decision, second: Decision) -> Decision:
    """Make one decision on a parameter that two layers share: left alone unless they agree."""
    if first.layout == second.layout:
        return first
    reason = f"tied, and the rules differ: {first.reason}; {second.reason}"
    return Decision(None, reason)


def _led_by_stack(layout: Layout, ndim: int) -> Layout:
    """Keep the surplus axes in front, where `vmap` and `scan` put the axes of a stack.

    >>> _led_by_stack(Layout("io"), 3)
    Layout('oio')
    """
    text = str(layout)
    return layout if "..." in text else Layout("b" * (ndim - len(text)) + text)


def _with_stack(layout: Layout, own_shape: Shape, shape: Shape) -> Layout | None:
    """Keep the axes that the layer itself does not have; None if no place for them fits.

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
