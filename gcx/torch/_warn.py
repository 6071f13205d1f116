"""Warnings that point at the line of the user."""

from __future__ import annotations

import warnings
from inspect import currentframe

# The packages whose frames may lie between that line and gcx.
_TRAINERS = {"accelerate", "lightning", "pytorch_lightning", "transformers"}
_BETWEEN = frozenset({"copy", "gcx", "pickle", "torch"} | _TRAINERS)


def warn(message: str) -> None:
    """Warn where the user called, however many frames of gcx and torch lie between."""
    frame, level = currentframe(), 1
    while frame is not None and _package(frame.f_globals) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _package(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]
