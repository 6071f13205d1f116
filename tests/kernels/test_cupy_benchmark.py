"""CuPy in the benchmarks: on NumPy, which stands in for CuPy, and by the names of the real one."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import times
from benchmarks.throughput.models import DTYPES, MODELS, Model, Weight

import reference
from emulated_libraries import CupyOnCpu

FILE = "benchmarks.throughput.on_cupy"
ON_CPU = pytest.mark.parametrize("library", [CupyOnCpu], indirect=True)
SMALL = Model("small", (Weight((4, 3, 2, 2)), Weight((6, 5), "...o")), ())


class Event:
    """A moment of a GPU that is never behind."""

    def record(self) -> None:
        self.seconds = perf_counter()

    def synchronize(self) -> None: ...


@pytest.fixture
def on_cupy(library: CupyOnCpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the file of CuPy on the stand-in."""
    cuda: Any = library.cupy.cuda
    cuda.Event = Event
    cuda.get_elapsed_time = lambda start, end: 1e3 * (end.seconds - start.seconds)
    device = cuda.Device
    monkeypatch.setattr(device, "attributes", {"L2CacheSize": 1 << 10}, raising=False)
    for name in ("use", "synchronize"):
        monkeypatch.setattr(device, name, lambda _: None, raising=False)
    cuda.runtime.getDeviceProperties = lambda number: {"name": b"GPU %d" % number}
    monkeypatch.delitem(sys.modules, FILE, raising=False)
    yield import_module(FILE)
    del sys.modules[FILE]


@ON_CPU
def test_gradients_are_centralized(on_cupy: Any) -> None:
    workload = on_cupy.workload(SMALL.weights, "float32", "cuda:0")
    workload.calls["copy"]()
    grads = workload.calls["expression"]()
    for name in ("expression", "gcx"):
        for grad, weight in zip(grads, SMALL.weights, strict=True):
            grad[...] = np.arange(grad.size).reshape(grad.shape) ** 2
            before = grad.copy()
            workload.calls[name]()
            right = reference.centralized(before, weight.axes)
            np.testing.assert_allclose(grad, right, atol=1e-4)
    assert workload.copied == 2 * 4 * SMALL.elements
    assert on_cupy.device_name("cuda:0") == "GPU 0"


@ON_CPU
@pytest.mark.usefixtures("on_cupy")
def test_limits_are_those_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vit-b16", "gpt2"):
        monkeypatch.setitem(MODELS, name, SMALL)
    rows = [*times.of_cupy(SimpleNamespace(device="cuda:0"))]  # type: ignore[arg-type]
    assert len(rows) == 2 * len(DTYPES)
    for row in rows:
        (copy,) = re.findall(r"a copy: (\S+) us", row.what)
        assert row.limit == pytest.approx(1.10 * float(copy) + 4, rel=1e-3)
        assert row.value > 0


def test_cupy_has_these_names() -> None:
    cupy = pytest.importorskip("cupy")
    source = Path(times.__file__).parents[1] / "throughput" / "on_cupy.py"
    names = {*re.findall(r"\bcp((?:\.\w+)+)", source.read_text(encoding="utf-8"))}
    assert len(names) > 5
    for name in names:
        attrgetter(name[1:])(cupy)
