"""Find out before the work whether its results can be written after it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from benchmarks.command.requirements import CannotRunError

__all__ = ["check_picture", "check_writable"]


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
        msg = f"{option} {path}: the name must end in .{', .'.join(sorted(endings))}"
        raise CannotRunError(msg)
    if not Path(path).parent.is_dir():
        msg = f"{option} {path}: there is no folder {Path(path).parent}"
        raise CannotRunError(msg)
