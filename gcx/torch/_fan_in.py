"""Where the fan-in of a weight is, and what is done with it."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor

from gcx.backends import _torch
from gcx.layout import Layout, LayoutLike, as_layout


class FanIn(NamedTuple):
    """Where the fan-in of a weight is; rules of layers answer with it where a layout is not enough.

    Attributes
    ----------
    layout : Layout
        The axes of the weight; of its view if there are several groups.
    ndim : int or None
        Rank of the weight, if the layer has but one: another rank means that something has
        flattened it.
    groups : int
        If more than 1, the weight (G * n, ...) is seen as (G, n, ...), and the layout begins with
        ``"oi"``.

    Examples
    --------
    The weight (in, out / groups, kernel...) of a transposed convolution:

    >>> from gcx import Layout
    >>> from gcx.torch import FanIn
    >>> FanIn(Layout("oio..."), groups=2)
    FanIn(layout=Layout('oio...'), ndim=None, groups=2)
    """

    layout: Layout = Layout("o...")
    ndim: int | None = None
    groups: int = 1

    def __str__(self) -> str:
        return f"layout {self.layout}" + (f" in {self.groups} groups" if self.groups > 1 else "")

    def fits(self, tensor: Tensor) -> bool:
        """Whether this describes a weight of such a shape; a vector has no fan-in to be found."""
        if self.ndim is not None and tensor.ndim != self.ndim:
            return False
        if tensor.ndim and tensor.shape[0] % self.groups:
            return False
        try:
            return bool(self._axes(tensor.ndim + (self.groups > 1)))
        except ValueError:
            return False

    def view_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Shape whose axes the layout names."""
        if self.groups == 1:
            return tuple(tensor.shape)
        rows, *rest = tensor.shape
        return (self.groups, rows // self.groups, *rest)

    def view(self, tensor: Tensor) -> Tensor:
        """See a tensor in the shape whose axes the layout names."""
        return tensor if self.groups == 1 else tensor.view(self.view_shape(tensor))

    def view_axes(self, tensor: Tensor) -> tuple[int, ...]:
        """Fan-in axes of the view."""
        return self._axes(tensor.ndim + (self.groups > 1))

    def size(self, tensor: Tensor) -> int:
        """Count the elements of one mean."""
        shape = self.view_shape(tensor)
        return prod(shape[axis] for axis in self._axes(len(shape)))

    def mean(self, tensor: Tensor, *, reproducible: bool = False) -> Tensor:
        """Average over the fan-in, in float32 at least; the result fits the tensor itself.

        That of a DTensor is for arithmetic and `subtract_` alone, which adds up its parts.
        """
        axes = self.view_axes(tensor)
        if self.groups == 1:
            return _torch.fan_in_mean(tensor, axes, reproducible)
        return _torch.fan_in_mean_of_groups(tensor, self.groups, axes, reproducible)

    def subtract_(self, tensor: Tensor, mean: Tensor) -> None:
        """Subtract in place what `mean` returns."""
        _torch.subtract(tensor, mean, tensor)

    def centralize(self, tensor: Tensor, *, reproducible: bool = False) -> Tensor:
        """Subtract the mean over the fan-in."""
        if self.groups == 1:  # by a kernel, if there is one
            return _torch.centralize(tensor, self.view_axes(tensor), 1.0, None, reproducible)
        return _torch.subtract(tensor, self.mean(tensor, reproducible=reproducible))

    def check_reproducible(self, tensor: Tensor) -> None:
        """Raise a TypeError if the bits of a mean cannot be promised, for its dtype or device."""
        axes = self.view_axes(tensor)
        # The rows of a group are on axis 0 of the tensor itself.
        own = axes if self.groups == 1 else tuple([axis - 1 for axis in axes])
        _torch.check_reproducible(tensor, own)

    def _axes(self, ndim: int) -> tuple[int, ...]:
        return self.layout.fan_in_axes(ndim)


def as_fan_in(answer: FanIn | LayoutLike) -> FanIn:
    """Read an answer about a weight; the layout of a `FanIn` may be text, too."""
    if isinstance(answer, FanIn):
        return answer._replace(layout=as_layout(answer.layout))
    return FanIn(as_layout(answer))


def is_trainable(weight: Tensor) -> bool:
    """Whether an optimizer can train a weight of this dtype: not integers, nor floats of 8 bits."""
    is_number = weight.is_floating_point() or weight.is_complex()
    return is_number and weight.dtype.itemsize > 1
