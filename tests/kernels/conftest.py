"""The `library` fixture: the same test on each library whose kernels are emulated."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emulated_libraries import CupyOnCpu, TorchOnCpu


@pytest.fixture(params=[TorchOnCpu, CupyOnCpu], ids=lambda kind: kind.name)
def library(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[CupyOnCpu]:
    """Keep compiled kernels in a new cache."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    found: CupyOnCpu = request.param(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with np.errstate(all="ignore"):
        yield found
