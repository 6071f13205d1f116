"""The verdicts and the report of ``python -m benchmarks gpu``, and the command that writes it."""

from __future__ import annotations

import json
import re
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from benchmarks.__main__ import main
from benchmarks.command import reports
from benchmarks.gpu import acceptance, device, times
from benchmarks.gpu.acceptance import Part
from benchmarks.gpu.report import GpuReport, Measured, Row, judged, render
from benchmarks.throughput.setting import setting

from gpu_standin import StandIn


class TestVerdict:
    @pytest.mark.parametrize(
        ("value", "limit", "at_least", "ok"),
        [
            (1.0, 1.0, False, True),
            (1.1, 1.0, False, False),
            (8.0, 8.0, True, True),
            (7.9, 8.0, True, False),
            (nan, 1.0, False, False),
            (-inf, 1.0, False, False),
            (inf, 8.0, True, False),
            (1.0, None, False, True),
            (nan, None, False, False),
        ],
    )
    def test_of_a_number(self, value: float, limit: Any, at_least: bool, ok: bool) -> None:
        measured = Measured("what", value, limit, "us", at_least)
        row = judged("part", measured)
        assert row.ok is ok
        assert json.loads(json.dumps(row.measured), parse_constant=pytest.fail) in (value, None)


ROW = Row(True, "time", "ResNet-50", 50.0, 60.0, "us", False, "")


class TestReport:
    def test_kept_and_missed(self) -> None:
        text = self.text(ROW, judged("speed", Measured("loop", 7.0, 8.0, "times", True)))
        assert re.search(r"time +ResNet-50 +50 us +<= 60 us +ok", text)
        assert re.search(r"speed +loop +7 times +>= 8 times +MISSED", text)
        assert text.endswith("2 rows in 12 seconds: 1 MISSED")
        error = self.text(judged("bits", Measured("bits.of_torch", nan, None), "RuntimeError: no"))
        assert re.search(r"bits +bits.of_torch +- +- +MISSED RuntimeError: no", error)

    def test_what_is_only_told_has_no_verdict(self) -> None:
        row = judged("time", Measured("gcx.centralize_many", 400.0, None, "us"))
        assert re.search(r"time +gcx.centralize_many +400 us +- +-$", self.text(row), re.MULTILINE)
        assert self.text(row).endswith("all limits are kept")

    def text(self, *rows: Row) -> str:
        ok = all(row.ok for row in rows)
        found = setting("python -m benchmarks gpu", {"cuda:0": "Some GPU"})
        return render(GpuReport(ok, found, {"SM clock before": "1 MHz"}, 4300.0, 12.3, rows, ()))


class TestState:
    @pytest.mark.parametrize(
        ("answer", "found"),
        [
            (
                "580.95, 1755 MHz, 1980 MHz",
                {"driver": "580.95", "SM clock": "1755 MHz of 1980 MHz"},
            ),
            ("No devices were found", {"SM clock": "unknown: No devices were found"}),
        ],
    )
    def test_of_a_busy_gpu(
        self, answer: str, found: Any, gpu: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f'#!/bin/sh\ntest "$2" = GPU-1f && echo "{answer}"\n')
        tool.chmod(0o755)
        monkeypatch.setattr(device, "which", lambda _: str(tool))
        properties = SimpleNamespace(uuid="1f")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        assert device.Gpu.state(gpu) == found


CLOCK = "1980 MHz of 1980 MHz"


class TestCommand:
    @pytest.mark.parametrize("hip", [None, "6.4"])
    def test_there_must_be_a_gpu(
        self, hip: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(hip))
        monkeypatch.setattr(torch.version, "hip", hip)
        assert main(["gpu", "--check"]) == 2
        assert ("this is ROCm" if hip else "there is no CUDA device") in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("function", "after"),
        [
            ("probe", CLOCK),
            ("of_nothing", CLOCK),
            ("break_it", "unknown: RuntimeError: an illegal memory access"),
        ],
    )
    def test_report_is_written(
        self,
        function: str,
        after: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        monkeypatch.setattr(acceptance, "Gpu", lambda *, is_brief, until: StandIn(until=until))
        monkeypatch.setattr(reports, "_RESULTS", tmp_path)
        monkeypatch.setattr(acceptance, "PARTS", [Part("probe", "times", function)])

        def fail(*_: object) -> None:
            raise RuntimeError("an illegal memory access")

        def break_it(gpu: Any) -> list[Measured]:
            gpu.state = gpu.times = fail
            return probe(gpu)

        def probe(_: Any) -> list[Measured]:
            return [Measured("what", 1.0, 2.0, "us")]

        for made in (probe, break_it):
            monkeypatch.setattr(times, made.__name__, made, raising=False)
        path = tmp_path / "some-gpu-check.json"
        command = ["gpu", "--check"]
        code = 1 if function == "of_nothing" else 0
        assert main(command) == code
        shown = json.loads(path.read_text(encoding="utf-8"))
        assert shown["ok"] is (code == 0)
        assert shown["setting"]["command"] == " ".join(["python -m benchmarks", *command])
        assert shown["setting"]["devices"] == {"cpu": "Some GPU"}
        assert shown["copy_gigabytes_per_second"] > 0
        assert shown["gpu"]["SM clock before"] == CLOCK
        assert shown["gpu"]["SM clock after"] == after
        assert len(shown["rows"]) == 1
        assert ("MISSED" in capsys.readouterr().out) is (code == 1)
