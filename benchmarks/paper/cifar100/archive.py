"""The official python archive of CIFAR-100, read after its checksums were found to be right."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import md5
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper.cifar100.pickles import load_data

__all__ = ["NAME", "OFFICIAL", "PACKED", "SIDE", "Archive", "Checksums", "Split", "read"]

NAME = "cifar-100-python"
PACKED = f"{NAME}.tar.gz"
SIDE = 32  # of an image, in pixels

_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Checksums:
    """MD5 of the packed archive, and of each file in it."""

    packed: str
    files: Mapping[str, str]


# The archive is on the page above, and the same as in torchvision.datasets.CIFAR100.
OFFICIAL = Checksums(
    packed="eb9058c3a382ffc7106e4002c42a8d85",
    files={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)


class Split(NamedTuple):
    """Images, shape (n, 32, 32, 3), of bytes, and the class of each, shape (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Archive(NamedTuple):
    """All images, and how many classes they are of."""

    train: Split
    test: Split
    classes: int


def read(folder: Path, checksums: Checksums = OFFICIAL) -> Archive:
    """Read ``cifar-100-python`` in `folder`, or else ``cifar-100-python.tar.gz``.

    Raises
    ------
    CannotRunError
        If neither is there, or a file is missing or not the right one.
    """
    contents = _contents(folder, checksums)
    for name, expected in checksums.files.items():
        _check(folder / NAME / name, contents[name], expected)
    train, test, meta = (load_data(contents[name]) for name in ("train", "test", "meta"))
    return Archive(_split(train), _split(test), len(meta[b"fine_label_names"]))


def _contents(folder: Path, checksums: Checksums) -> dict[str, bytes]:
    if (folder / NAME).is_dir():
        return {name: _bytes(folder / NAME / name) for name in checksums.files}
    if (folder / PACKED).is_file():
        packed = _bytes(folder / PACKED)
        _check(folder / PACKED, packed, checksums.packed)
        return _unpacked(packed, checksums.files)
    raise CannotRunError(
        f"{folder} holds neither {PACKED} nor the folder {NAME}: {_remedy(folder)}"
    )


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise CannotRunError(f"{path} is missing: {_remedy(path.parent)}")
    return path.read_bytes()


def _check(path: Path, content: bytes, expected: str) -> None:
    # MD5 finds accidents and other files. What is forged all the same runs nothing: see pickles.py.
    found = md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise CannotRunError(
            f"{path} is incomplete, was changed or is another file: it has {len(content)} bytes "
            f"with the MD5 checksum {found}, which ought to be {expected}: {_remedy(path.parent)}"
        )


def _remedy(folder: Path) -> str:
    """Say how to get the packed archive, which is read where no unpacked one is beside it."""
    unpacked, packed = folder / NAME, folder / PACKED
    if folder.name == NAME:
        unpacked, packed = folder, folder.parent / PACKED
    away = f"delete the folder {unpacked}, and " if unpacked.is_dir() else ""
    return f'{away}download "CIFAR-100 python version" from {_PAGE} and save it as {packed}'


def _unpacked(packed: bytes, names: Mapping[str, str]) -> dict[str, bytes]:
    """Read the files in memory, so that no path in the archive is written to."""
    contents = {}
    with tarfile.open(fileobj=BytesIO(packed)) as tar:
        for name in names:
            file = tar.extractfile(f"{NAME}/{name}")
            assert file is not None, name  # the checksum was right
            contents[name] = file.read()
    return contents


def _split(entries: Mapping[bytes, Any]) -> Split:
    planes = entries[b"data"].reshape(-1, 3, SIDE, SIDE)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return Split(images, np.asarray(entries[b"fine_labels"], np.int64))
