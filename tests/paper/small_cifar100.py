"""A small archive in the format of CIFAR-100, which is that of Python 2's pickles."""

from __future__ import annotations

import io
import pickle
import tarfile
from hashlib import md5
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.paper.cells import Cell
from benchmarks.paper.cifar100.archive import NAME, PACKED, Checksums
from benchmarks.paper.cifar100.settings import Scale, Setting

CLASSES = 5
TRAIN, TEST = 40, 16  # images

CPU = torch.device("cpu")
SMALL = Scale(blocks=(1, 1), width=4, batch=8)
CELL = Cell("CIFAR-100", "ResNet-50", "SGDM", 0.1, 5e-4)
SETTING = Setting(CELL, "conv only", seed=0, epochs=4, scale=SMALL, precision="float32", data="")


def checkpoint_of(setting: Setting, study: Path) -> Path:
    return study / setting.folder / "checkpoint.pt"


class SmallArchive(NamedTuple):
    """Where an archive is, and what is in it."""

    folder: Path
    checksums: Checksums
    entries: dict[str, dict[bytes, Any]]

    def path(self, name: str) -> Path:
        return self.folder / NAME / name


def write_archive(
    folder: Path, *, packed: bool = False, other: dict[str, bytes] | None = None
) -> SmallArchive:
    """Write an archive; `other` are pickles to put in the place of the right ones."""
    entries = {"train": _split(b"training", TRAIN), "test": _split(b"testing", TEST)}
    entries["meta"] = {b"fine_label_names": [b"class %d" % k for k in range(CLASSES)]}
    pickles = {name: _pickled(value) for name, value in entries.items()} | (other or {})
    (folder / NAME).mkdir(parents=True)
    for name, content in pickles.items():
        (folder / NAME / name).write_bytes(content)
    digest = ""
    if packed:
        with tarfile.open(folder / PACKED, "w:gz") as tar:
            tar.add(folder / NAME, NAME)
        digest = md5_of((folder / PACKED).read_bytes())
        for name in pickles:
            (folder / NAME / name).unlink()
        (folder / NAME).rmdir()
    checksums = Checksums(digest, {name: md5_of(content) for name, content in pickles.items()})
    return SmallArchive(folder, checksums, entries)


def md5_of(content: bytes) -> str:
    return md5(content, usedforsecurity=False).hexdigest()


def _split(name: bytes, n: int) -> dict[bytes, Any]:
    """Images whose brightness says a part of their class, so that there is something to learn."""
    random = np.random.default_rng(n)
    labels = random.integers(CLASSES, size=n)
    data = random.integers(128, size=(n, 3 * 32 * 32)) + labels[:, None] * 25
    return {
        b"data": data.astype(np.uint8),
        b"fine_labels": labels.tolist(),
        b"coarse_labels": (labels // 2).tolist(),
        b"filenames": [b"image_s_%06d.png" % k for k in range(n)],
        b"batch_label": name + b" batch 1 of 1",
    }


def _pickled(value: object) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue()


class _Python2Pickler(pickle._Pickler):  # the one in Python, whose opcodes can be chosen
    """Writes bytes and text as the strings of Python 2, and arrays with NumPy's names of then."""

    dispatch = pickle._Pickler.dispatch.copy()

    def _save_string(self, value: bytes | str) -> None:
        content = value.encode() if isinstance(value, str) else value
        size = len(content)
        if size < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([size]) + content)
        else:
            self.write(pickle.BINSTRING + size.to_bytes(4, "little") + content)

    dispatch[bytes] = dispatch[str] = _save_string

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or value.__qualname__}\n".encode())

    # The one in Python finds classes and functions by these.
    dispatch[type] = dispatch[type(len)] = dispatch[type(_split)] = save_global
