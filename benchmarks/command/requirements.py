"""What a command cannot do without."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from benchmarks.command.attempt import attempt

__all__ = ["CannotRunError", "require"]


class CannotRunError(Exception):
    """A command that has not done anything; the message says what to do."""


def require(*modules: str, install: str) -> None:
    """Import `modules`, which `install` installs.

    Raises
    ------
    CannotRunError
        If one is missing or broken.
    """
    for module in modules:
        _, error = attempt(partial(import_module, module))
        if error:
            msg = f"this needs {module} ({error}): {install}"
            raise CannotRunError(msg)
