"""Gradient Centralization for thinc's optimizers, with which spaCy trains."""

from gcx._frameworks import needing

with needing("thinc", '"gcx[thinc]"'):
    from gcx.thinc._centralize import GradientCentralization, centralize
    from gcx.thinc._plan import plan, register_layer

__all__ = ["GradientCentralization", "centralize", "plan", "register_layer"]
