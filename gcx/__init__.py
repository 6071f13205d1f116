"""Gradient Centralization for every array library.

``gcx.centralize(grad)`` subtracts from a gradient its mean over the fan-in. ``gcx.optim`` has
optimizers for NumPy and CuPy. Each framework has an adapter to import, such as ``gcx.torch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gcx._centralize import centralize, centralize_many
from gcx.layout import Layout

if TYPE_CHECKING:
    from gcx import diagnostics as diagnostics
    from gcx import optim as optim
    from gcx import testing as testing

__version__ = "0.1.0.dev0"  # the only place; the build reads it here
__all__ = ["Layout", "__version__", "centralize", "centralize_many"]


def __getattr__(name: str) -> Any:
    # These need no framework, so they are imported at their first use.
    if name in ("diagnostics", "optim", "testing"):
        from importlib import import_module

        return import_module(f"gcx.{name}")
    adapters = ("keras", "lightning", "optax", "thinc", "torch", "transformers")
    hint = f"; use `import gcx.{name}`" if name in adapters else ""
    raise AttributeError(f"module 'gcx' has no attribute {name!r}{hint}")
