"""Gradient Centralization for Keras 3 optimizers, on the torch and JAX backends."""

from gcx._frameworks import needing

with needing("keras", '"gcx[keras]"'):
    from gcx.keras._optimizer import Centralized, GradientCentralization, centralize
    from gcx.keras._plan import plan, register_layer

__all__ = ["Centralized", "GradientCentralization", "centralize", "plan", "register_layer"]
