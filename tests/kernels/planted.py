"""Faults in sources and in copies of gcx, to see that a test notices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gcx


def copy_with_fault(folder: Path, file: str, text: str, fault: str) -> None:
    """Copy gcx into a folder, and put `fault` where `text` is, of which there is one in the file.

    Parameters
    ----------
    folder : Path
        Where the copy goes; for PYTHONPATH.
    file : str
        Within the package, such as ``"backends/_tiles.py"``.
    text, fault : str
        What is there, and what takes its place.
    """
    package = folder / "gcx"
    shutil.copytree(
        Path(gcx.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    edited = replaced(text, fault)((package / file).read_text())
    (package / file).write_text(edited)


def replaced(text: str, fault: str) -> Callable[[str], str]:
    """Make a function that puts `fault` where `text` is, of which there is one in a source."""

    def edit(source: str) -> str:
        assert source.count(text) == 1, f"there are {source.count(text)} in the source: {text}"
        return source.replace(text, fault)

    return edit
