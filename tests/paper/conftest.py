"""Makes `benchmarks` importable, which nobody installs; last, so that gcx may be elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True, scope="module")
def in_haste(compiled_in_haste: None) -> None:
    """A run of a few steps is compiled longer than it takes."""


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small archive in the format of CIFAR-100."""
    from small_cifar100 import write_archive

    return write_archive(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="session")
def data(written: Any) -> Any:
    """Its images, on the CPU."""
    from benchmarks.paper.cifar100.archive import read
    from benchmarks.paper.cifar100.training import Data

    from small_cifar100 import CPU

    return Data.on(CPU, read(written.folder, written.checksums))
