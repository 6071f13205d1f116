"""Answers of the user that come before those of the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from gcx._globs import matches, no_match
from gcx.layout import Layout, LayoutLike
from gcx.plan import LeaveAlone
from gcx.torch._fan_in import FanIn, as_fan_in, is_trainable

Key = str | Tensor | nn.Module
Value = FanIn | LayoutLike | int | Sequence[int] | LeaveAlone | None
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
    if not isinstance(overrides, Mapping):
        msg = f"overrides is a mapping from names to layouts, not {overrides!r}"
        raise TypeError(msg)
    named = list(named)
    found: dict[Tensor, FanIn | LeaveAlone] = {}
    for key, value in overrides.items():
        covered = [(name, p) for name, p in named if _covers(key, name, p)]
        leaves_alone = value is None or isinstance(value, LeaveAlone)
        if isinstance(key, nn.Module) and not leaves_alone:
            # The vectors of a module are its biases, which have no axes to speak of.
            covered = [(name, p) for name, p in covered if p.ndim > 1]
        if not covered:
            raise ValueError(_covers_nothing(key, leaves_alone, [name for name, _ in named]))
        for name, parameter in covered:
            found.setdefault(parameter, _answer(value, name, parameter))
    return found


def _covers(key: Key, name: str, parameter: Tensor) -> bool:
    if isinstance(key, str):
        return matches(key, name)
    if isinstance(key, nn.Module):
        return any(parameter is own for own in key.parameters())
    if isinstance(key, Tensor):
        return parameter is key
    msg = (
        f"overrides: a key is the name of a parameter, a glob, a parameter or a module, not "
        f"{key!r}; gcx.torch.register_layer is for a type of layer"
    )
    raise TypeError(msg)


def _covers_nothing(key: Key, leaves_alone: bool, names: list[str]) -> str:
    if isinstance(key, nn.Module):
        what = "parameters of the model" + ("" if leaves_alone else " with two axes or more")
        return f"overrides: a {type(key).__name__} holds no {what}"
    if isinstance(key, Tensor):
        return f"overrides: a tensor of shape {tuple(key.shape)} is no parameter of the model"
    return no_match(key, names, what="overrides")


def _answer(value: Value, name: str, weight: Tensor) -> FanIn | LeaveAlone:
    if value is None:
        return _AS_GIVEN
    if isinstance(value, LeaveAlone):
        return value
    if isinstance(value, (FanIn, Layout, str)):
        fan_in = as_fan_in(value)
    else:
        fan_in = FanIn(_layout_of_axes(value, name, weight.ndim))
    if not fan_in.fits(weight):
        msg = f"overrides: {name} of shape {tuple(weight.shape)} does not fit {fan_in}"
        raise ValueError(msg)
    if not is_trainable(weight):
        msg = f"overrides: {name} is of dtype {weight.dtype}, which has no gradient"
        raise ValueError(msg)
    return fan_in


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
