"""The requirements of a command, which are checked before it does anything."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from importlib import import_module
from pathlib import Path

from gcx.__main__ import attempt

__all__ = [
    "CannotRunError",
    "check_picture",
    "check_writable",
    "require",
]


class CannotRunError(Exception):
    """The command has not done anything; the message names a remedy."""


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
            raise CannotRunError(f"this needs {module} ({error}): {install}")


def check_picture(option: str, path: str) -> None:
    """See that matplotlib can write a picture there; errors as `check_writable`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_writable(option, path, FigureCanvasAgg.get_supported_filetypes())


def check_writable(option: str, path: str, endings: Collection[str]) -> None:
    """See that a file of that name can be written.

    Raises
    ------
    CannotRunError
        If the folder does not exist, or the name has none of the endings.
    """
    if Path(path).suffix.removeprefix(".") not in endings:
        raise CannotRunError(
            f"{option} {path}: the name must end in .{', .'.join(sorted(endings))}"
        )
    if not Path(path).parent.is_dir():
        raise CannotRunError(f"{option} {path}: there is no folder {Path(path).parent}")
