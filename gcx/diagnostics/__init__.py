"""Measurements of the effect of Gradient Centralization on a model, before training.

`energy_removed` takes gradients of any array library. The functions of the same name in
``gcx.diagnostics.torch`` and ``gcx.diagnostics.jax`` compute the gradients of a model first; import
these modules by name.
"""

from gcx.diagnostics._arrays import energy_removed
from gcx.diagnostics._report import EnergyReport, EnergyRow, Share

__all__ = ["EnergyReport", "EnergyRow", "Share", "energy_removed"]
