"""Gradient Centralization for torch optimizers."""

from gcx._frameworks import needing

with needing("torch", '"gcx[torch]"'):
    from gcx.torch._centralize import GradientCentralization, centralize, centralized
    from gcx.torch._check import check_plan
    from gcx.torch._fused import SGD, AdamW
    from gcx.torch._gradients import (
        CentralizationInBackward,
        centralize_grads_,
        centralize_in_backward,
    )
    from gcx.torch._layers import register_layer
    from gcx.torch._matrices import Matrices, matrices
    from gcx.torch._plan import plan

__all__ = [
    "SGD",
    "AdamW",
    "CentralizationInBackward",
    "GradientCentralization",
    "Matrices",
    "centralize",
    "centralize_grads_",
    "centralize_in_backward",
    "centralized",
    "check_plan",
    "matrices",
    "plan",
    "register_layer",
]
