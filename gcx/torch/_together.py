"""Gradients of many weights, centralized together: on CUDA, in one launch for each dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from gcx.torch._gradients import Rate, centralize_gradient
from gcx.torch._plan import Weight


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
