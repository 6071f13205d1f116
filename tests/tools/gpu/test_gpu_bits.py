"""The bits that the GPU check expects, and the gradients for which it does."""

from __future__ import annotations

import sys
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import gcx
from benchmarks.agreement.formats import FORMATS
from benchmarks.gpu import bits, cases

import reference
from gpu_standin import StandIn, not_centralized
from torch_kernels import Device

FORMAT = {kind.name: kind for kind in FORMATS}


class TestBits:
    def test_canonical_order_has_the_bits(self, gpu: StandIn, kernels: Device) -> None:
        seen: dict[str, list[bool]] = {"16 bytes at a time": [], "elementwise": []}
        count = 0
        for row in bits.of_torch(gpu):
            assert row.ok, row
            (access,) = (access for access in seen if access in row.what)
            for launch in kernels.driver.launches[count:]:
                seen[access].append(access == "elementwise" or not launch.elementwise)
                assert bool(launch.packed) is (access != "elementwise"), row
            count = len(kernels.driver.launches)
        assert all(seen["16 bytes at a time"])
        assert min(map(len, seen.values())) >= 4 * 3 * 2  # dtypes, ways, rows and columns

    @pytest.mark.parametrize("code", [0, 1])
    def test_few_of_them_for_slow_inspectors(
        self, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["bits", "cpu"])
        monkeypatch.setattr(bits, "_FEW", (9, 144))
        if code:
            monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=not_centralized))
        assert bits.main() == code

    def test_wrong_bits_are_counted(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        def one_bit_off(grads: Any, **options: Any) -> Any:
            first, *rest = gcx.centralize_many(grads, **options)
            changed = first.clone()
            changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(9.0).to(first))
            return [changed, *rest]

        monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=one_bit_off))
        assert {row.value for row in bits.of_torch(gpu)} == {1}

    def test_what_is_not_written_is_found(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=not_centralized))
        assert not any(row.ok for row in bits.of_torch(gpu))

    @pytest.mark.parametrize(
        ("found", "expected", "count"),
        [
            ([0.0, 1.0], [0.0, 1.0], 0),
            ([0.0, 1.0], [-0.0, 1.0], 1),
            ([nan, 1.0], [nan, 2.0], 1),
            ([nan, inf], [1.0, -inf], 2),
        ],
    )
    def test_count_differing(self, found: list[float], expected: list[float], count: int) -> None:
        assert bits.count_differing(np.array(found), np.array(expected)) == count

    def test_repeats(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bits, "_REPEATS", 2)
        assert all(row.ok for row in bits.of_repeats(gpu))
        answers = iter(range(99))

        def another_each_time(grads: Any, **_: Any) -> Any:
            return [grad + next(answers) for grad in grads[:1]]

        monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=another_each_time))
        assert {row.value for row in bits.of_repeats(gpu)} == {2}


class TestCases:
    @pytest.mark.parametrize("fan_in", cases.FAN_INS[:5])
    def test_expected_is_the_mean_over_the_stated_fan_in(self, fan_in: int) -> None:
        for case, sample, expected in cases.subjects(FORMAT["float64"], fan_in):
            if not np.isfinite(sample.values).all() or "close" in sample.name:
                continue
            right = reference.centralized(sample.values, case.fan_in)
            np.testing.assert_allclose(expected, right, atol=1e-11)
            assert np.prod([case.shape[axis] for axis in case.fan_in]) == fan_in

    def test_places_in_memory(self) -> None:
        found = {
            (sample.name.split("'")[1], sample.name.rpartition(", ")[2]): sample.lay_out(
                sample.values, torch.tensor
            )
            for _, sample, _ in cases.subjects(FORMAT["float32"], 4608)
        }
        row_of_matrix = found["o...", "rows apart"].stride()
        assert row_of_matrix[-1] == 1
        assert found["o...", "off by one"].data_ptr() % 16
        assert {place for _, place in found} >= {"off by one", "rows apart", "channels last"}
        channels_last = found["io...", "channels last"]
        assert channels_last.is_contiguous(memory_format=torch.channels_last)
