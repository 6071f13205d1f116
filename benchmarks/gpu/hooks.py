"""What the hooks of `gcx.torch` launch, for gradients that they centralize in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from benchmarks.throughput.models import Weight
from gcx.backends import _torch_cuda

__all__ = ["launching"]


def launching(weights: Sequence[Weight]) -> Callable[[list[Tensor]], None]:
    """Give what centralizes one list of gradients after the other, as a hook does in each step.

    A call raises a RuntimeError if the kernels leave a gradient as it is.
    """
    launches = _torch_cuda.Launches()
    axes = [weight.axes for weight in weights]

    def centralize(grads: list[Tensor]) -> None:
        left = launches.centralize_(grads, axes)
        if left:
            msg = f"the kernels do not take gradients {left}"
            raise RuntimeError(msg)

    return centralize
