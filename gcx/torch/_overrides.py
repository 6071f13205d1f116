"""Answers of the user that come before those of the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from gcx.layout import Layout, LayoutLike, as_layout
from gcx.plan import LeaveAlone
from gcx.torch._fan_in import FanIn

# By name or glob, parameter, or module (all of its parameters); None leaves alone.
Overrides = Mapping[str | Tensor | nn.Module, LayoutLike | int | Sequence[int] | None]

_AS_GIVEN = LeaveAlone("left alone by an override")


def answers(
    overrides: Overrides, named: Iterable[tuple[str, Tensor]]
) -> dict[Tensor, FanIn | LeaveAlone]:
    """Give each parameter the answer of the first key that covers it.

    Raises a ValueError for a key that covers nothing, or an answer that does not fit the weight.
    """
    named = list(named)
    found: dict[Tensor, FanIn | LeaveAlone] = {}
    for key, value in overrides.items():
        covered = [(name, p) for name, p in named if _covers(key, name, p)]
        if not covered:
            msg = f"overrides: {_shown(key)} is or matches no parameter of the model"
            raise ValueError(msg)
        for name, parameter in covered:
            # The vectors of a whole module are its biases, which have no axes to speak of.
            is_bias = isinstance(key, nn.Module) and parameter.ndim < 2
            answer = _AS_GIVEN if value is None or is_bias else _fan_in(value, name, parameter)
            found.setdefault(parameter, answer)
    return found


def _covers(key: str | Tensor | nn.Module, name: str, parameter: Tensor) -> bool:
    if isinstance(key, str):
        return key == name or fnmatchcase(name, key)
    if isinstance(key, nn.Module):
        return any(parameter is own for own in key.parameters())
    return parameter is key


def _fan_in(value: LayoutLike | int | Sequence[int], name: str, weight: Tensor) -> FanIn:
    if isinstance(value, (str, Layout)):
        layout = as_layout(value)
    else:
        layout = _layout_of_axes(value, name, weight.ndim)
    fan_in = FanIn(layout)
    if not fan_in.fits(weight):
        msg = f"overrides: {name} of shape {tuple(weight.shape)} does not fit layout {layout}"
        raise ValueError(msg)
    if not (weight.is_floating_point() or weight.is_complex()):
        msg = f"overrides: {name} is of dtype {weight.dtype}, which has no gradient"
        raise ValueError(msg)
    return fan_in


def _layout_of_axes(value: int | Sequence[int], name: str, ndim: int) -> Layout:
    axes = (value,) if isinstance(value, int) else tuple(value)
    if not axes or not all(isinstance(axis, int) and -ndim <= axis < ndim for axis in axes):
        msg = (
            f"overrides: {name} has rank {ndim}; give a layout, fan-in axes of that rank, or None "
            f"to leave it alone, not {value!r}"
        )
        raise ValueError(msg)
    fan_in = {axis % ndim for axis in axes}
    return Layout("".join("i" if axis in fan_in else "o" for axis in range(ndim)))


def _shown(key: object) -> str:
    if isinstance(key, Tensor):
        return f"a tensor of shape {tuple(key.shape)}"
    return repr(key) if isinstance(key, str) else f"a {type(key).__name__}"
