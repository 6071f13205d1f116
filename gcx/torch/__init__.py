"""Gradient Centralization for the optimizers of torch."""

from gcx.torch._fan_in import FanIn
from gcx.torch._fused import SGD, AdamW
from gcx.torch._hooks import GradientCentralization, centralize
from gcx.torch._in_backward import CentralizationInBackward, centralize_in_backward
from gcx.torch._layers import register_layer
from gcx.torch._now import centralize_grads_
from gcx.torch._plan import plan

__all__ = [
    "SGD",
    "AdamW",
    "CentralizationInBackward",
    "FanIn",
    "GradientCentralization",
    "centralize",
    "centralize_grads_",
    "centralize_in_backward",
    "plan",
    "register_layer",
]
