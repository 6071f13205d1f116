"""Gradient Centralization for the optimizers of Keras 3, with the backends torch and JAX."""

from gcx.keras._centralize import centralize
from gcx.keras._layers import register_layer
from gcx.keras._optimizer import Centralized, GradientCentralization
from gcx.keras._plan import plan

__all__ = ["Centralized", "GradientCentralization", "centralize", "plan", "register_layer"]
