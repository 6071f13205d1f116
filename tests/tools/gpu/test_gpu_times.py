"""Times in the GPU check: calls beside a copy and beside loops, and a step of JAX."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.gpu import times
from benchmarks.gpu.acceptance import Part, measure
from benchmarks.throughput.models import DTYPES

from gpu_standin import PEER, StandIn
from libraries import installed
from small_models import SMALL


class TestTimes:
    def test_limits_are_those_of_a_copy(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        per_byte = 1 / 4.3e12
        monkeypatch.setattr(gpu, "times", lambda calls: {"gcx": 1e-6, "copy": per_byte})
        found = [row.limit for row in times.of_models(gpu)]
        size = 2 * SMALL.elements
        assert found[0] == pytest.approx(1.10e6 * 4 * size * per_byte + 4)
        assert found[1] == pytest.approx(1.10e6 * 2 * size * per_byte + 4)
        assert len(found) == len(DTYPES) * len(times._MODELS)

    def test_all_gradients_of_a_rotation_are_centralized(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lists = []
        calls = gpu.rotation(SMALL.weights, "float32", lists.append)
        for call in calls:
            call()
        size = 4 * SMALL.elements
        assert size * len(calls) >= 4 * gpu.cache_bytes() > size * (len(calls) - 1)
        assert len({grad.data_ptr() for grads in lists for grad in grads}) == 2 * len(calls)

    def test_time_is_that_of_one_call(self, gpu: StandIn) -> None:
        gpu._clock = lambda call, _: 6.0
        found = gpu.times({"three": [int, int, int]})
        assert found["three"] == 2.0
        assert found["copy"] == 6.0 / (2 * 2 * 4 * gpu.cache_bytes())

    def test_speedup(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds = {"gcx": 1.0, "the loop": 7.0, "pytorch_optimizer": 0.5}
        monkeypatch.setattr(gpu, "end_to_end", lambda calls: {k: seconds[k] for k in calls})
        rows, left_out = measure(gpu, [Part("name", "times", "against_loops")])
        verdicts = {row.what.partition(": ")[2]: row.ok for row in rows}
        assert verdicts.pop("gcx over the loop") is False
        assert bool(left_out) is not verdicts.get("gcx over pytorch_optimizer", False)
        seconds["the loop"] = 8.0
        assert all(row.ok for row in measure(gpu, [Part("name", "times", "against_loops")])[0])

    def test_missing_peer_has_a_line(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, PEER, None)
        rows, (item,) = measure(gpu, [Part("name", "times", "against_loops")])
        assert len(rows) == len(DTYPES)
        assert item.why == "not installed: pytorch_optimizer"

    def test_end_to_end_waits_after_the_last_step(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        happened: list[str] = []
        monkeypatch.setattr(gpu, "wait", lambda: happened.append("wait"))
        gpu.end_to_end({"a": lambda: happened.append("a")}, steps=3)
        assert "".join(happened[3:7]) == "aaawait"


@pytest.mark.skipif(not installed("jax"), reason="needs JAX")
class TestJax:
    def test_step_of_every_place(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.gpu import on_jax

        seconds = {"none": 1.0, "gcx": 1.1, "optax": 1.0}

        def interleaved(candidates: Any, **_: Any) -> Any:
            for call in candidates.values():
                call()
            return {name: seconds[name] for name in candidates}

        monkeypatch.setattr(on_jax, "interleaved", interleaved)
        assert [row.ok for row in on_jax.times(gpu)] == [True, False]

    def test_jax_without_a_gpu_is_not_measured(self, gpu: StandIn) -> None:
        gpu.device = "cuda:0"
        rows, (item,) = measure(gpu, [Part("JAX", "on_jax", "times", needs=("jax",))])
        assert rows == ()
        assert (item.ok, item.why) == (True, "the first device of JAX is cpu:0")
