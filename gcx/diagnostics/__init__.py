"""What Gradient Centralization would do to your model, before you train with it.

`energy_removed` here is for gradients that are there already, of any array library;
``gcx.diagnostics.torch`` and ``gcx.diagnostics.jax`` have one each that computes them for a model
and its batches, and are imported by these names.
"""

from gcx.diagnostics._arrays import energy_removed
from gcx.diagnostics._report import EnergyReport, EnergyRow, Share

__all__ = ["EnergyReport", "EnergyRow", "Share", "energy_removed"]
