"""Gradient Centralization for optax, with layouts that the model gives."""

from gcx.optax._layouts import layouts, plan
from gcx.optax._models import register_layer
from gcx.optax._transform import centralize

__all__ = ["centralize", "layouts", "plan", "register_layer"]
