"""The Triton kernels on a CPU: Triton interprets them, one tile after the other.

Triton must be told before it is imported, and then interprets everything. So where there is a GPU,
whose tests need it to compile, the interpreted tests run in a process of their own, started with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import pytest


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


INSTALLED = all(map(find_spec, ("torch", "triton")))
if INSTALLED and "triton" not in sys.modules and not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> Any:
    from torch_kernels import FakeCuda

    return FakeCuda()


@pytest.fixture
def interpreter(device: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interpreter of Triton, where the host's code takes a CPU for `device`."""
    from torch_kernels import interpret

    return interpret(monkeypatch, device)


@pytest.fixture
def on_cpu(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Further patches beside those of `interpreter`."""
    return monkeypatch
