"""Launches in the GPU check, counted by the profiler and recorded in CUDA graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.gpu import device, graphs, launches
from benchmarks.throughput import cuda
from benchmarks.throughput.models import DTYPES

from gpu_standin import StandIn
from torch_kernels import Device


class TestLaunches:
    def test_counts_of_the_profiler(self, gpu: StandIn) -> None:
        gpu.seen = cuda.Profile(kernels=4, copies=1, waits=1, seconds=1.0)
        rows = list(launches.counted(gpu))
        assert len(rows) == 3 * len(DTYPES) * 3
        assert not any(row.ok for row in rows)
        gpu.seen = cuda.Profile(kernels=1, copies=0, waits=0, seconds=1.0)
        assert all(row.ok for row in launches.counted(gpu))

    def test_limits_are_what_the_kernels_launch(self, gpu: StandIn, kernels: Device) -> None:
        gpu.profile = partial(self.launch, kernels)  # type: ignore[method-assign]
        assert all(row.ok for row in launches.counted(gpu))

    def launch(self, kernels: Device, call: Any) -> cuda.Profile:
        before = len(kernels.driver.launches)
        call()
        return cuda.Profile(len(kernels.driver.launches) - before, 0, 0, 1.0)

    def test_addresses_change_where_a_row_says_so(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begins: list[int] = []
        monkeypatch.setattr(
            launches, "centralize", lambda _, grads: begins.append(grads[0].data_ptr())
        )
        same, changing = launches.host(gpu)
        calls = len(begins) // 2
        assert len(set(begins[:calls])) == 1
        assert begins[calls : calls + 4] == 2 * [*dict.fromkeys(begins)]
        assert [same.limit, changing.limit] == [60, 60]
        begins.clear()
        gpu.profile = lambda call: (call(), call(), gpu.seen)[-1]  # type: ignore[method-assign]
        next(launches.counted(gpu))
        assert len(set(begins)) == 2


class TestGraphs:
    @pytest.mark.parametrize("function", [graphs.replays, graphs.changing_addresses])
    def test_right_bits(self, function: Any, gpu: StandIn) -> None:
        rows = list(function(gpu))
        assert len(rows) == 2
        assert all(row.ok for row in rows)

    def test_graph_that_does_nothing(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "record", lambda _: int)
        assert not any(row.ok for row in graphs.replays(gpu))

    def test_graph_with_one_list_of_two(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(graphs, "in_turn", lambda calls: device.in_turn(calls[:1]))
        assert not any(row.ok for row in graphs.replays(gpu))

    def test_stale_addresses_are_found(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        first: list[Any] = []

        def centralize(weights: Any, grads: Any) -> Any:
            first[:] = first or grads
            return device.centralize(weights, first)

        monkeypatch.setattr(graphs, "centralize", centralize)
        assert next(graphs.changing_addresses(gpu)).value == 3 * len(graphs._WEIGHTS)
