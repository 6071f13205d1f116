"""Clocks, profiles and free memory in ``python -m benchmarks throughput``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.throughput import timing
from benchmarks.throughput.setting import free_bytes_of_host


class TestMemory:
    def test_of_this_machine(self) -> None:
        assert 0 < free_bytes_of_host() < 1 << 50

    def test_of_a_machine_that_does_not_say(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("benchmarks.throughput.setting._MEMINFO", tmp_path / "none")
        assert free_bytes_of_host() == 8 * 2**30


class TestTiming:
    def test_candidates_take_turns(self) -> None:
        called: list[str] = []
        times = timing.interleaved(
            {"a": lambda: called.append("a"), "b": lambda: called.append("b")},
            seconds=0,
            repeats=2,
            rounds=3,
        )
        assert set(times) == {"a", "b"}
        assert "".join(called) == "ab" + "aabb" + "bbaa" + "aabb"

    def test_median_of_what_the_clock_says(self) -> None:
        said = iter([5.0, 1.0, 2.0])
        times = timing.interleaved({"a": int}, seconds=0, rounds=3, clock=lambda *_: next(said))
        assert times == {"a": 2.0}

    def test_clock_of_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        happened: list[str] = []

        class Event:
            def record(self) -> None:
                happened.append("record")

            def synchronize(self) -> None:
                happened.append("synchronize")

        clock = timing.DeviceClock(
            flush=lambda: happened.append("flush"), event=Event, milliseconds=lambda *_: 4.0
        )
        now = iter([10.0, 10.009, 20.0, 20.001])  # the host takes 9 ms, then 1 ms
        monkeypatch.setattr(timing, "perf_counter", lambda: next(now))
        assert clock(lambda: happened.append("call"), 1) == 0.004
        time_of_a_flush = ["flush", "record", "flush", "record", "synchronize"]
        timed = ["record", "call", "record", "synchronize"]
        assert happened == ["call", *time_of_a_flush, *6 * ["flush"], *timed]
        happened.clear()
        clock(lambda: happened.append("call"), 1)
        assert happened == ["call", *2 * ["flush"], *timed]

    def test_host_clock_does_not_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter([10.0, 11.0])
        monkeypatch.setattr(timing, "perf_counter", lambda: next(now))
        waited: list[object] = []
        assert timing.host_clock(waited.append)(lambda: "result", 1) == 1.0
        assert waited == ["result"]

    def test_waiting_clock_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waited: list[object] = []
        assert timing.waiting_clock(waited.append)(lambda: "result", 2) >= 0
        assert waited == ["result", "result"]


class Event(SimpleNamespace):
    """An event of torch's profiler."""

    def __init__(
        self, name: str, device: str, start: float, end: float, *, named: bool = False
    ) -> None:
        time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        kind = SimpleNamespace(name=device)
        super().__init__(
            name=name, device_type=kind, time_range=time_range, is_user_annotation=named
        )


class TestProfile:
    CALL = (
        Event("call under test", "CPU", 10, 20, named=True),
        Event("call under test", "CUDA", 12, 30, named=True),
    )

    def test_kernels_and_copies(self) -> None:
        events = (
            *self.CALL,
            Event("Memcpy HtoD (Pinned -> Device)", "CUDA", 11, 12),
            Event("multi_tensor", "CUDA", 12, 15),
            Event("multi_tensor", "CUDA", 15, 16),
            Event("Optimizer.step#AdamW.step", "CPU", 10, 11, named=True),
            Event("Optimizer.step#AdamW.step", "CUDA", 12, 16, named=True),
            Event("cudaLaunchKernel", "CPU", 11, 12),
        )
        cuda = pytest.importorskip("benchmarks.throughput.cuda")
        found = cuda.summarized(events)
        assert found == cuda.Profile(kernels=2, copies=1, waits=0, seconds=pytest.approx(4e-6))

    def test_only_waits_of_the_call_count(self) -> None:
        cuda = pytest.importorskip("benchmarks.throughput.cuda")
        after = Event("cudaDeviceSynchronize", "CPU", 20, 25)
        assert cuda.summarized((*self.CALL, after)).waits == 0
        during = Event("cudaStreamSynchronize", "CPU", 15, 16)
        assert cuda.summarized((*self.CALL, after, during)).waits == 1
