"""Weights to centralize: where their fan-in is, and what is done to their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcx._tree import naming
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


class Weight(NamedTuple):
    """A parameter to centralize, and whether its means are to have equal bits everywhere."""

    name: str
    parameter: Tensor
    fan_in: FanIn
    reproducible: bool = False

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor of the shape of the parameter, as `FanIn.mean`."""
        return self.fan_in.mean(tensor, reproducible=self.reproducible)

    def check(self, tensor: Tensor) -> None:
        """Raise a TypeError that names the weight if the bits of a mean cannot be promised."""
        if self.reproducible:
            with naming(self.name):
                self.fan_in.check_reproducible(tensor)


_DENSE = torch.strided

# Factor of the weight that an optimizer adds to its gradient, if it does.
Rate = float | Tensor | None


def with_gradient(weights: Iterable[Weight]) -> list[tuple[Weight, Tensor]]:
    """List the weights that have a gradient, with that.

    Raises a TypeError if the mean of one cannot be taken, or not as reproducibly as it should.
    """
    found = [(w, grad) for w in weights if (grad := w.parameter.grad) is not None]
    for weight, grad in found:
        if grad.layout is not _DENSE:
            msg = (
                f"{weight.name} has a gradient of layout {grad.layout}, which has no mean over the "
                "fan-in; make it dense (sparse=False), or use where='update'"
            )
            raise TypeError(msg)
        if weight.reproducible:
            weight.check(grad)
    return found


def centralize_gradient(weight: Weight, rate: Rate) -> None:
    """Centralize a gradient to which the optimizer adds `rate` times the weight, if not None."""
    parameter = weight.parameter
    grad = parameter.grad
    assert grad is not None
    if 0 in grad.stride():  # expanded: several elements in one place
        grad = parameter.grad = grad.contiguous()
    mean = weight.mean(grad)
    if rate is not None:
        mean = mean + rate * weight.mean(parameter)
    weight.fan_in.subtract_(grad, mean)


class Together:
    """Centralizes the gradients of the same weights step after step."""

    def __init__(self) -> None:
        self._batches: dict[int, _Batch] = {}  # by the position of the rate

    def centralize_(self, gradients: Mapping[Rate, Sequence[tuple[Weight, Tensor]]]) -> None:
        """Centralize gradients to which the optimizer adds the rate times the weight."""
        for position, (rate, found) in enumerate(gradients.items()):
            weights = [weight for weight, _ in found]
            # A rate in a tensor stays in there: to read it would be to wait for the device.
            if not isinstance(rate, Tensor) and any(is_for_kernels(grad) for _, grad in found):
                grads = [grad for _, grad in found]
                weights = self._batch(position).centralize_(weights, grads, rate)
            for weight in weights:
                centralize_gradient(weight, rate)

    def _batch(self, position: int) -> _Batch:
        if position not in self._batches:
            self._batches[position] = _Batch()
        return self._batches[position]

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a model that holds its handle make their own: batches know of addresses.
        return {"_batches": {}}


def is_for_kernels(grad: Tensor) -> bool:
    """Whether a gradient is where there may be kernels for it."""
    return grad.is_cuda


class _Batch:
    """What is centralized in one launch for each dtype."""

    def __init__(self) -> None:
        # Not where there is no tensor on CUDA.
        from gcx.backends._torch_cuda import Launches

        self._launches = Launches()
        self._weights: list[Weight] = []
        self._axes: list[tuple[int, ...]] = []
        self._in_groups: list[int] = []

    def centralize_(
        self, weights: list[Weight], grads: list[Tensor], rate: float | None
    ) -> list[Weight]:
        """Centralize the gradients that the kernels take, and return the weights of the others."""
        if not (len(weights) == len(self._weights) and all(map(is_, weights, self._weights))):
            self._look_at(weights)
        added = None if rate is None else self._viewed([weight.parameter for weight in weights])
        left = self._launches.centralize_(
            self._viewed(grads),
            self._axes,
            added,
            rate or 0.0,
            reproducible=weights[0].reproducible,
        )
        return [weights[k] for k in left]

    def _look_at(self, weights: list[Weight]) -> None:
        self._weights = weights
        self._axes = [weight.fan_in.view_axes(weight.parameter) for weight in weights]
        self._in_groups = [k for k, weight in enumerate(weights) if weight.fan_in.groups > 1]

    def _viewed(self, tensors: list[Tensor]) -> list[Tensor]:
        for k in self._in_groups:
            tensors[k] = self._weights[k].fan_in.view(tensors[k])
        return tensors
