"""Where the fan-in of a weight is, and what is done with it."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor

from gcx.backends import _torch
from gcx.layout import Layout


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

    def fits(self, tensor: Tensor) -> bool:
        """Whether a weight has the rank that this describes; a vector has no fan-in to be found."""
        if self.ndim is not None:
            return tensor.ndim == self.ndim
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
        """See a tensor of the shape of the weight with the axes that the layout names."""
        return tensor if self.groups == 1 else tensor.view(self.view_shape(tensor))

    def size(self, tensor: Tensor) -> int:
        """Count the elements of one mean."""
        shape = self.view_shape(tensor)
        return prod(shape[axis] for axis in self._axes(len(shape)))

    def mean(self, tensor: Tensor) -> Tensor:
        """Average over the fan-in, in float32 at least; the result fits the tensor itself.

        That of a DTensor is for arithmetic and `subtract_` alone, which adds up its parts.
        """
        axes = self._axes(tensor.ndim + (self.groups > 1))
        if self.groups == 1:
            return _torch.fan_in_mean(tensor, axes)
        return _torch.fan_in_mean_of_groups(tensor, self.groups, axes)

    def subtract_(self, tensor: Tensor, mean: Tensor) -> None:
        """Subtract in place what `mean` returns."""
        _torch.subtract(tensor, mean, tensor)

    def centralize(self, tensor: Tensor) -> Tensor:
        """Subtract the mean over the fan-in."""
        return _torch.subtract(tensor, self.mean(tensor))

    def _axes(self, ndim: int) -> tuple[int, ...]:
        return self.layout.fan_in_axes(ndim)
