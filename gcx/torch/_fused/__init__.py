"""Optimizers of torch with Gradient Centralization in their step."""

from gcx.torch._fused._optimizers import SGD, AdamW

__all__ = ["SGD", "AdamW"]
