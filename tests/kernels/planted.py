"""A copy of gcx with a fault in it, to see that a test notices."""

from __future__ import annotations

import shutil
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
    source = (package / file).read_text()
    assert source.count(text) == 1, f"there are {source.count(text)} in {file}: {text}"
    (package / file).write_text(source.replace(text, fault))
