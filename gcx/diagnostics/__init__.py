"""Measure how much of your model's gradient Gradient Centralization would remove.

`energy_removed` takes gradients of any array library. ``gcx.diagnostics.torch`` and
``gcx.diagnostics.jax``, imported by these names, compute them for a model and its batches.
"""

from typing import Any

from gcx.diagnostics._energy import energy_removed
from gcx.diagnostics._report import EnergyReport, EnergyRow, Share

__all__ = ["EnergyReport", "EnergyRow", "Share", "energy_removed"]


def __getattr__(name: str) -> Any:
    hint = f"; use `import gcx.diagnostics.{name}`" if name in ("jax", "torch") else ""
    raise AttributeError(f"module 'gcx.diagnostics' has no attribute {name!r}{hint}")
