"""Files that are there as a whole or not at all, in folders that were tried before the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from benchmarks.command.requirements import CannotRunError

__all__ = ["check_folder", "write_whole"]


def check_folder(option: str, folder: Path) -> None:
    """Make a folder, if it is not there, and see that files can be written to it.

    Raises
    ------
    CannotRunError
        If they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CannotRunError(
            f"{option} {folder}: no file can be written there ({error}); name another folder"
        ) from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside the file, and put that in its place when it is on the disk.

    It is so even if the process is killed at any time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
