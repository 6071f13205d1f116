"""Answers of the user that come before those of the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from gcx.layout import Layout, LayoutLike, as_layout
from gcx.plan import LeaveAlone
from gcx.torch._fan_in import FanIn

Key = str | Tensor | nn.Module
Value = LayoutLike | int | Sequence[int] | None
# By name or glob, parameter, or module (all of its parameters); None leaves alone.
Overrides = Mapping[Key, Value]

_AS_GIVEN = LeaveAlone("left alone by an override")


def answers(
    overrides: Overrides, named: Iterable[tuple[str, Tensor]]
) -> dict[Tensor, FanIn | LeaveAlone]:
    """Give each parameter the answer of the first key that covers it.

    Raises a TypeError for a key or a value of the wrong kind, and a ValueError for a key that
    covers nothing, or a value that does not fit the weight.
    """
    named = list(named)
    found: dict[Tensor, FanIn | LeaveAlone] = {}
    for key, value in overrides.items():
        covered = [(name, p) for name, p in named if _covers(key, name, p)]
        if isinstance(key, nn.Module) and value is not None:
            # The vectors of a module are its biases, which have no axes to speak of.
            covered = [(name, p) for name, p in covered if p.ndim > 1]
        if not covered:
            raise ValueError(_covers_nothing(key, value, [name for name, _ in named]))
        for name, parameter in covered:
            answer = _AS_GIVEN if value is None else _fan_in(value, name, parameter)
            found.setdefault(parameter, answer)
    return found


def _covers(key: Key, name: str, parameter: Tensor) -> bool:
    if isinstance(key, str):
        return key == name or fnmatchcase(name, key)
    if isinstance(key, nn.Module):
        return any(parameter is own for own in key.parameters())
    if isinstance(key, Tensor):
        return parameter is key
    msg = (
        f"overrides: a key is the name of a parameter, a glob, a parameter or a module, not "
        f"{key!r}; gcx.torch.register_layer is for a type of layer"
    )
    raise TypeError(msg)


def _covers_nothing(key: Key, value: Value, names: list[str]) -> str:
    if isinstance(key, nn.Module):
        what = "parameters of the model" + ("" if value is None else " with two axes or more")
        return f"overrides: a {type(key).__name__} holds no {what}"
    if isinstance(key, Tensor):
        return f"overrides: a tensor of shape {tuple(key.shape)} is no parameter of the model"
    shown = 10
    listed = ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
    return f"overrides: {key!r} matches no parameter of the model; there are: {listed or '(none)'}"


def _fan_in(value: LayoutLike | int | Sequence[int], name: str, weight: Tensor) -> FanIn:
    if isinstance(value, (str, Layout)):
        layout = as_layout(value)
    else:
        layout = _layout_of_axes(value, name, weight.ndim)
    fan_in = FanIn(layout)
    if not fan_in.fits(weight):
        msg = f"overrides: {name} of shape {tuple(weight.shape)} does not fit layout {layout}"
        raise ValueError(msg)
    if not is_trainable(weight):
        msg = f"overrides: {name} is of dtype {weight.dtype}, which has no gradient"
        raise ValueError(msg)
    return fan_in


def is_trainable(weight: Tensor) -> bool:
    """Whether an optimizer can train a weight of this dtype: not integers, nor floats of 8 bits."""
    is_number = weight.is_floating_point() or weight.is_complex()
    return is_number and weight.dtype.itemsize > 1


def _layout_of_axes(value: int | Sequence[int], name: str, ndim: int) -> Layout:
    axes = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):
        msg = (
            f"overrides: the value for {name} is a layout, the axes of its fan-in, or None to "
            f"leave it alone, not {value!r}"
        )
        raise TypeError(msg)
    if not axes or not all(-ndim <= axis < ndim for axis in axes):
        msg = (
            f"overrides: {name} has rank {ndim}, and {value!r} is not fan-in axes of it; None "
            "leaves it alone"
        )
        raise ValueError(msg)
    fan_in = {axis % ndim for axis in axes}
    return Layout("".join("i" if axis in fan_in else "o" for axis in range(ndim)))
