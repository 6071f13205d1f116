"""``python -m benchmarks info`` and ``check``, and what the commands have in common."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gcx
from benchmarks.__main__ import main
from benchmarks.agreement import bits, gradients, run, targets
from benchmarks.agreement.formats import FORMATS
from benchmarks.agreement.gradients import CASES, Case
from benchmarks.agreement.report import CheckReport, render
from benchmarks.command import info, libraries, progress
from benchmarks.command.double_precision import double_precision
from gcx import backends
from gcx.backends import _array_api, _numpy

import reference
from libraries import installed

# Each of them is compiled by JAX for each dtype, so they are few; `nox -s demo` checks with all.
FEW_CASES = (Case((5, 3), "o...", (1,)), Case((4, 2, 3), "oio", (1,)), Case((3, 1), "o...", ()))


class TestCommandLine:
    def test_without_a_command_it_prints_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 0
        text = capsys.readouterr().out
        assert "Gradient Centralization (GC) subtracts" in text
        assert "exit codes:" in text

    def test_help_loads_no_framework(self) -> None:
        code = "import sys; from benchmarks.__main__ import main; main([]); print(*sys.modules)"
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        modules = shown.stdout.decode().split()
        assert "gcx" in modules
        assert not {"numpy", "torch", "jax", "cupy"} & set(modules)

    def test_it_is_a_command_of_python(self) -> None:
        command = [sys.executable, "-m", "benchmarks", "check", "--seed", "many"]
        shown = subprocess.run(command, capture_output=True, check=False)
        assert shown.returncode == 2
        assert b"'many' is not a whole number" in shown.stderr

    def test_interruption_leaves_no_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(info, "collect", interrupted)
        assert main(["info"]) == 130

    @pytest.mark.parametrize(
        ("command", "module", "install"),
        [
            ("check", "numpy", 'pip install "gcx[numpy]"'),
            ("bench --plot speed.png", "matplotlib", "pip install matplotlib"),
            ("bench gpu --check", "torch", 'pip install "gcx[numpy,torch]"'),
            ("demo", "numpy", 'pip install "gcx[demo]"'),
            ("demo", "sklearn", 'pip install "gcx[demo]"'),
            ("demo", "matplotlib", 'pip install "gcx[demo]"'),
        ],
    )
    def test_missing_package_is_one_clear_line(
        self,
        command: str,
        module: str,
        install: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for needed in ("sklearn", "matplotlib"):
            monkeypatch.setitem(sys.modules, needed, SimpleNamespace())
        monkeypatch.setitem(sys.modules, module, None)
        assert main([*command.split(), "--json"]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert f"this needs {module}" in err
        assert install in err
        assert install in json.loads(out)["error"]


class TestInfo:
    def test_there_is_a_row_for_every_library(self) -> None:
        names = [library.name for library in info.collect().libraries]
        assert names == [*backends.LIBRARIES, "any other"]

    def test_installed_library(self) -> None:
        found = libraries.look_up("numpy")
        assert (found.state, found.version, found.devices) == ("ok", np.__version__, ("cpu",))
        assert (_numpy.__doc__ or "").startswith(found.path)

    def test_missing_library_comes_with_the_command_that_installs_it(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(libraries, "find_spec", lambda name: None)
        assert main(["info"]) == 0
        text = capsys.readouterr().out
        for name in backends.LIBRARIES:
            assert f"not installed: {libraries.INSTALL[name]}" in text

    def test_library_without_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_numpy, "devices", list)
        assert libraries.look_up("numpy").state == "no device"

    @pytest.mark.parametrize("function", ["load", "devices"])
    def test_broken_library_shows_its_error(
        self,
        function: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: object) -> None:
            msg = "libcuda.so is of the wrong age\nand more"
            raise OSError(msg)

        monkeypatch.setattr(libraries if function == "load" else _numpy, function, fail)
        assert main(["info"]) == 1
        assert "broken: OSError: libcuda.so is of the wrong age\n" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("reason", "said"),
        [
            ("", "; on CUDA one launch of a Triton kernel for each dtype"),
            ("Triton is not installed", "; on CUDA, too: Triton is not installed"),
        ],
    )
    def test_cuda_device_of_torch(
        self, reason: str, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("torch")
        from gcx.backends import _torch, _torch_cuda

        monkeypatch.setattr(_torch, "devices", lambda: ["cpu", "cuda:0"])
        monkeypatch.setattr(_torch_cuda, "why_not", lambda: reason)
        assert libraries.look_up("torch").path.endswith(said)

    def test_kernels_are_not_spoken_of_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch")
        from gcx.backends import _torch, _torch_cuda

        monkeypatch.setattr(_torch, "devices", lambda: ["cpu"])
        monkeypatch.setattr(_torch_cuda, "why_not", pytest.fail)
        assert (_torch.__doc__ or "").startswith(libraries.look_up("torch").path)

    def test_json_is_written_to_a_file_beside_the_text(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "info.json"
        code = main(["info", "--json", str(path)])
        shown = json.loads(path.read_text(encoding="utf-8"))
        assert shown["ok"] is (code == 0)
        assert "any other" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("path", "reason"),
        [("info.txt", "must end in .json"), ("nowhere/info.json", "there is no folder nowhere")],
    )
    def test_json_that_cannot_be_written(
        self,
        path: str,
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(info, "collect", pytest.fail)
        assert main(["info", "--json", path]) == 2
        assert reason in capsys.readouterr().err

    def test_json_is_the_report(self, capsys: pytest.CaptureFixture[str]) -> None:
        code = main(["info", "--json"])
        shown = json.loads(capsys.readouterr().out)
        assert shown == json.loads(json.dumps(asdict(info.collect())))
        assert code == (0 if shown["ok"] else 1)


class TestReferenceOfCheck:
    """What `check` compares with is itself compared with something else."""

    @pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
    def test_rounding_is_that_of_the_dtype(self, kind: Any) -> None:
        if kind.name.startswith(("bfloat", "float8")):
            pytest.importorskip("ml_dtypes")
        values = np.random.default_rng(0).normal(0, 1, 1000) * 2.0 ** np.arange(-12, 8).repeat(50)
        if kind.is_complex:
            values = values + 1j * values[::-1]
        expected = values.astype(_numpy._dtype(kind.name)).astype(values.dtype)
        np.testing.assert_array_equal(kind.round(values), expected)

    @pytest.mark.parametrize("case", [c for c in CASES if c.fan_in], ids=str)
    @pytest.mark.parametrize("dtype", ["float64", "complex128"])
    def test_exact_answer(self, case: Case, dtype: str) -> None:
        values = np.random.default_rng(1).normal(3, 1, case.shape).astype(dtype)
        found = gradients.centralized(values, case.fan_in)
        np.testing.assert_array_equal(found, reference.centralized(values, case.fan_in))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_stated_fan_in_is_that_of_the_layout(self, case: Case) -> None:
        axes = gcx.Layout(case.layout).fan_in_axes(len(case.shape))
        assert case.fan_in in (axes, ())


def without_gc(grad: Any, *_: Any) -> Any:
    return grad.copy()


def over_all_axes(grad: Any, *_: Any) -> Any:
    wide = grad.astype("complex64" if grad.dtype.kind == "c" else "float32")
    return (wide - wide.mean()).astype(grad.dtype)


def not_a_number(grad: Any, *_: Any) -> Any:
    return (grad * np.nan).astype(grad.dtype)


def flat(*arguments: Any) -> Any:
    return correct(*arguments).ravel()


def doubled(*arguments: Any) -> Any:
    return correct(*arguments).astype("complex128")


def raising(*_: Any) -> Any:
    msg = "no kernel"
    raise NotImplementedError(msg)


def rounding_the_mean(grad: Any, axes: Any, *_: Any) -> Any:
    wide = grad.astype("complex128" if grad.dtype.kind == "c" else "float64")
    mean = wide.mean(axis=axes, keepdims=True).astype(grad.dtype)
    return (wide - mean.astype(wide.dtype)).astype(grad.dtype)


correct = _numpy.centralize
Fault = Callable[..., Any]


class TestCheck:
    check = staticmethod(partial(run.run, cases=FEW_CASES))

    def test_libraries_agree(self) -> None:
        names = [name for name in backends.LIBRARIES if installed(name)]
        report = self.check(names=names)
        assert report.ok, render(report)
        checked = {row.backend for row in report.rows if row.dtype == "float32"}
        assert checked == {*names, "array API", "any two"}
        in_double = {row.backend for row in report.rows if row.dtype == "float64"}
        assert in_double == checked

    def test_all_gradients_are_drawn_for_numpy(self) -> None:
        report = run.run(names=["numpy"])
        assert report.ok, render(report)
        assert {row.cases for row in report.rows if row.backend == "numpy"} == {len(CASES)}

    @pytest.mark.parametrize("seed", range(1, 6))
    def test_libraries_agree_whatever_is_drawn(self, seed: int) -> None:
        report = run.run(seed, names=[name for name in backends.LIBRARIES if installed(name)])
        assert report.ok, render(report)

    def test_bits(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        few = partial(bits.run, names=["numpy"], cases=FEW_CASES[:1])
        monkeypatch.setattr(bits, "run", few)
        assert main(["check", "--bits", "--seed", "4", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(few(4))))

    def test_seed_draws_other_gradients(self) -> None:
        one, same, other = (self.check(seed, names=["numpy"]).rows for seed in (1, 1, 2))
        assert one == same
        assert one != other

    @pytest.mark.parametrize(
        "fault", [without_gc, over_all_axes, not_a_number, flat, doubled, raising]
    )
    def test_planted_fault_is_found(
        self, fault: Fault, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(_numpy, "centralize", fault)
        monkeypatch.setattr(run, "run", partial(self.check, names=["numpy"]))
        assert main(["check"]) == 1
        assert "FAILED" in capsys.readouterr().out
        assert not any(row.ok for row in self.of("numpy"))

    def test_second_rounding_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_numpy, "centralize", rounding_the_mean)
        rows = {row.dtype: row for row in self.of("numpy")}
        assert not rows["float16"].ok
        assert rows["float32"].ok

    def test_difference_between_backends_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_array_api, "centralize", without_gc)
        failed = {row.backend for row in self.check(names=["numpy"]).rows if not row.ok}
        assert failed == {"array API", "any two"}

    def test_bias_must_come_back_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def centralize(grad: Any, layout: str) -> Any:
            return gcx.centralize(grad, layout=layout) if grad.size > 3 else grad.copy()

        monkeypatch.setattr(targets, "gcx", SimpleNamespace(centralize=centralize))
        (row,) = (row for row in self.of("numpy") if row.dtype == "float32")
        assert row.worst is None
        assert row.at == "3x1 'o...': ValueError: the gradient should have come back as it is"

    def test_dtype_that_the_library_lacks_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        report = self.check_without("float64", monkeypatch)
        assert report.ok
        reasons = {item.what: item.why for item in report.left_out}
        expected = "TypeError: made float32 when asked for float64"
        assert reasons["float64 in numpy on cpu"] == expected

    def test_float32_cannot_be_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not self.check_without("float32", monkeypatch).ok

    def test_broken_library_is_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            msg = "a shared object is missing"
            raise ImportError(msg)

        monkeypatch.setattr(libraries, "load", fail)
        report = self.check(names=["numpy"])
        assert not report.ok
        assert "FAILED: broken: ImportError: a shared object is missing" in render(report)

    def test_json_is_the_report(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(_numpy, "centralize", not_a_number)
        monkeypatch.setattr(run, "run", partial(self.check, names=["numpy"]))
        main(["check", "--json", "--seed", "3"])
        shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert shown["seed"] == 3
        assert shown == json.loads(json.dumps(asdict(self.check(3, names=["numpy"]))))

    def of(self, backend: str) -> list[Any]:
        return [row for row in self.check(names=[backend]).rows if row.backend == backend]

    def check_without(self, dtype: str, monkeypatch: pytest.MonkeyPatch) -> CheckReport:
        """Check a NumPy that makes another dtype than asked for, like JAX without float64."""
        made = {dtype: "float32" if dtype == "float64" else "float16"}
        asarray = _numpy.asarray

        def substituting(values: Any, asked: str, device: str) -> Any:
            return asarray(values, made.get(asked, asked), device)

        monkeypatch.setattr(_numpy, "asarray", substituting)
        return self.check(names=["numpy"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def test_bar_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert list(progress.track("abcd", "working")) == list("abcd")
        lines = terminal.getvalue().split("\r\x1b[K")
        assert lines[1] == f"working [{' ' * 30}] 0/4"
        assert lines[3] == f"working [{'#' * 15}{' ' * 15}] 2/4"
        assert lines[-1] == ""

    def test_interruption_clears_the_bar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        items = progress.track("abcd", "working")
        next(items)
        items.close()
        assert terminal.getvalue().endswith("\r\x1b[K")

    def test_nothing_where_nobody_looks(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert list(progress.track("abcd", "working")) == list("abcd")
        assert capsys.readouterr() == ("", "")


def test_double_precision_ends_with_the_block() -> None:
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        with double_precision(["numpy", "jax"]):
            assert jax.numpy.ones(1).dtype == "float64"
        assert jax.numpy.ones(1).dtype == "float32"
    finally:
        jax.config.update("jax_enable_x64", before)
