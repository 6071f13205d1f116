"""Gradient Centralization for optax, with layouts that the model gives."""

from gcx._frameworks import needing

with needing("optax", '"gcx[jax]"'):
    from gcx.optax._layouts import plan
    from gcx.optax._models import layouts, register_layer
    from gcx.optax._muon import muon_dimension_numbers
    from gcx.optax._transform import centralize

__all__ = ["centralize", "layouts", "muon_dimension_numbers", "plan", "register_layer"]
