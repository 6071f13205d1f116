"""Programs of the GPU check: streams and processes at once, and sanitizers."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from benchmarks.gpu import programs, stress
from benchmarks.gpu.acceptance import Part, measure
from benchmarks.gpu.report import NotRunError

from gpu_standin import StandIn, not_centralized


@pytest.mark.one_framework
class TestConcurrency:
    def test_both(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(programs, "_LAUNCHES", 20)
        rows = [*programs.two_streams(gpu), *programs.two_processes(gpu)]
        assert [row.value for row in rows] == [2, 0, 4, 0]
        assert all(row.ok for row in rows)


class TestStress:
    def test_no_gradient_is_wrong(self) -> None:
        assert stress.stress("cpu", 1) == 0

    def test_every_wrong_gradient_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stress, "gcx", SimpleNamespace(centralize_many=not_centralized))
        assert stress.stress("cpu", 2) == 2 * 2 * len(stress._SHAPES)


class TestPrograms:
    def test_what_they_print(self) -> None:
        command = [sys.executable, "-c", "print('done')"]
        assert programs.outputs([command] * 2, seconds=60) == ["done\n", "done\n"]

    def test_last_line_of_an_error(self) -> None:
        with pytest.raises(RuntimeError, match=r"exit code 1: ValueError: no$"):
            programs.outputs([[sys.executable, "-c", "raise ValueError('no')"]], seconds=60)

    def test_one_that_hangs_is_ended(self) -> None:
        with pytest.raises(RuntimeError, match="not done after 0 seconds"):
            programs.outputs([[sys.executable, "-c", "import time; time.sleep(60)"]], seconds=0.01)


class TestSanitizer:
    def test_it_need_not_be_there(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu.is_brief = False
        monkeypatch.setenv("PATH", "")
        for function in (programs.memcheck, programs.racecheck):
            with pytest.raises(NotRunError, match="compute-sanitizer is not on the PATH"):
                list(function(gpu))

    @pytest.mark.parametrize(("code", "ok"), [(0, True), (9, False)])
    def test_its_verdict(
        self,
        code: int,
        ok: bool,
        gpu: StandIn,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        gpu.is_brief = False
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/said\necho ERROR SUMMARY\nexit {code}\n'
        )
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        (row,), _ = measure(gpu, [Part("sanitizer", "programs", "memcheck")])
        assert row.ok is ok
        said = (tmp_path / "said").read_text(encoding="utf-8")
        assert said.startswith("--tool memcheck --report-api-errors no --error-exitcode 9")
        assert said.rstrip().endswith("-m benchmarks.gpu.bits cpu")
        if not ok:
            assert row.why == "RuntimeError: exit code 9: ERROR SUMMARY"
