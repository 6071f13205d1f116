"""``python -m benchmarks gpu`` on a CPU that emulates the kernels.

It cannot tell the numbers. Here each row is seen to measure its subject, and to find a fault.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def gpu() -> Any:
    from gpu_standin import StandIn

    return StandIn()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    from gcx.backends import _torch

    from torch_kernels import EMULATED, Device

    monkeypatch.setattr(_torch, "is_for_kernels", lambda _: True)
    return Device(EMULATED, monkeypatch)


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take small models and few steps."""
    from benchmarks.gpu import bits, graphs, optimizers, times
    from benchmarks.throughput.models import MODELS

    from small_models import SMALL, TRANSPOSED

    for name in MODELS:
        monkeypatch.setitem(MODELS, name, TRANSPOSED if name == "gpt2" else SMALL)
    monkeypatch.setattr(times, "_MODELS", (SMALL, TRANSPOSED))
    monkeypatch.setattr(graphs, "_STEPS", 3)
    monkeypatch.setattr(graphs, "_WEIGHTS", (*SMALL.weights, *TRANSPOSED.weights))
    monkeypatch.setattr(optimizers, "_MODELS", (SMALL,))
    monkeypatch.setattr(bits, "FAN_INS", (9, 144))
