"""``python -m gcx``: it shows what is here, finds faults, and ends quietly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

import gcx
from gcx import __main__, backends
from gcx.__main__ import INSTALL, look_up, main
from gcx.backends import _numpy

HERE = Path(gcx.__file__).parents[1]

WITH_NUMPY_ALONE = """
from gcx import __main__
__main__.LIBRARIES = ("numpy",)
__main__.exit_after(__main__.main)
"""


correct = _numpy.centralize
Patch = pytest.MonkeyPatch
Printed = pytest.CaptureFixture[str]


def rounding_the_mean(grad: Any, axes: Any, *_: Any) -> Any:
    wide = grad.astype("float64")
    mean = wide.mean(axis=axes, keepdims=True).astype(grad.dtype)
    return (wide - mean.astype("float64")).astype(grad.dtype)


def raising(*_: Any) -> Any:
    raise NotImplementedError("no kernel")


RESULT, GRADIENT = "FAILED ValueError: the result has", "the gradient"
# A fault, and the verdict on float32; that on float16 is always that it failed.
FAULTS: list[tuple[Callable[..., Any], str]] = [
    (lambda grad, *_: grad.copy(), "FAILED"),
    (lambda grad, *_: grad * grad.dtype.type(np.nan), "FAILED not finite"),
    (lambda *a: correct(*a).ravel(), f"{RESULT} shape (2048,), {GRADIENT} (32, 64)"),
    (lambda *a: correct(*a).astype("float64"), f"{RESULT} dtype float64, {GRADIENT} float32"),
    (raising, "FAILED NotImplementedError: no kernel"),
    (rounding_the_mean, "ok"),  # a second rounding shows in float16 alone
]


@pytest.fixture
def numpy_alone(monkeypatch: Patch) -> None:
    monkeypatch.setattr(__main__, "LIBRARIES", ["numpy"])


class TestReport:
    def test_all_libraries_are_named_and_all_is_well(self, capsys: Printed) -> None:
        assert main([]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"gcx {gcx.__version__} in {Path(gcx.__file__).parent}, Python 3")
        assert text.endswith("All is well.\n")
        for name in (*backends.LIBRARIES, "any other"):
            assert f"\n{name} " in text

    def test_json(self, capsys: Printed) -> None:
        assert main(["--json"]) == 0
        shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert shown["ok"]
        rows = {(row["library"], row["device"], row["dtype"]) for row in shown["checks"]}
        assert rows == {
            (library["name"], device, dtype)
            for library in shown["libraries"]
            for device in library["devices"]
            for dtype in ("float32", "float16")
        }
        assert ("numpy", "cpu", "float32") in rows
        assert all(0 < row["error"] <= row["limit"] for row in shown["checks"])
        limits = {row["dtype"]: row["limit"] for row in shown["checks"]}
        assert limits == {"float32": 4.0, "float16": 0.51}

    @pytest.mark.parametrize(("fault", "verdict"), FAULTS)
    @pytest.mark.usefixtures("numpy_alone")
    def test_planted_fault_is_found(
        self, fault: Callable[..., Any], verdict: str, monkeypatch: Patch, capsys: Printed
    ) -> None:
        monkeypatch.setattr(_numpy, "centralize", fault)
        assert main(["--json"]) == 1
        shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert not shown["ok"]
        assert shown["checks"][0]["verdict"] == verdict
        assert shown["checks"][1]["verdict"].startswith("FAILED")
        assert main([]) == 1
        assert "FAILED: something above is wrong" in capsys.readouterr().out


class TestLibraries:
    def test_installed_with_a_device_and_without(self, monkeypatch: Patch) -> None:
        found = look_up("numpy")
        assert (found.state, found.version, found.devices) == ("ok", np.__version__, ("cpu",))
        assert (_numpy.__doc__ or "").startswith(found.how)
        monkeypatch.setattr(_numpy, "devices", list)
        assert look_up("numpy").state == "no device"

    def test_missing_library_comes_with_its_command(self, monkeypatch: Patch) -> None:
        monkeypatch.setattr(__main__, "find_spec", lambda name: None)
        for name in backends.LIBRARIES:
            found = look_up(name)
            assert (found.state, found.how) == ("not installed", f"not installed: {INSTALL[name]}")

    @pytest.mark.parametrize("function", ["load", "devices"])
    @pytest.mark.usefixtures("numpy_alone")
    def test_broken_library_shows_its_error(
        self, function: str, monkeypatch: Patch, capsys: Printed
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError("libcuda.so is of the wrong age\nand more")

        monkeypatch.setattr(__main__ if function == "load" else _numpy, function, fail)
        assert main([]) == 1
        assert "broken: OSError: libcuda.so is of the wrong age\n" in capsys.readouterr().out

    def test_torch_on_a_cpu_has_no_kernels(self, monkeypatch: Patch) -> None:
        backend: Any = pytest.importorskip("gcx.backends._torch", exc_type=ImportError)
        monkeypatch.setattr(backend, "devices", lambda: ["cpu"])
        assert backend.__doc__.startswith(f"{look_up('torch').how}.")


class TestProgram:
    def test_version_loads_no_framework(self) -> None:
        code = """
import sys
from gcx.__main__ import main
try:
    main(["--version"])
finally:
    print(*sys.modules)
"""
        version, modules = ran("-c", code).stdout.decode().splitlines()
        assert version == f"gcx {gcx.__version__}"
        assert not {"numpy", "torch", "jax", "cupy"} & set(modules.split())

    def test_clone_without_any_package(self, tmp_path: Path) -> None:
        shutil.copytree(HERE / "gcx", tmp_path / "gcx")
        version = ran("-S", "-m", "gcx", "--version", folder=tmp_path)
        assert version.stdout.decode().strip() == f"gcx {gcx.__version__}"
        shown = ran("-S", "-m", "gcx", "--json", folder=tmp_path)
        why = "array-api-compat and numpy missing: pip install array-api-compat numpy"
        assert (shown.returncode, shown.stderr.decode()) == (2, f"python -m gcx: {why}\n")
        assert json.loads(shown.stdout) == {"ok": False, "error": why}

    def test_closed_pipe(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            shown = ran("-c", WITH_NUMPY_ALONE, output=pipe)
        assert (shown.returncode, shown.stderr) == (141, b"")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_full_disk(self) -> None:
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            shown = ran("-c", WITH_NUMPY_ALONE, output=full)
        assert (shown.returncode, shown.stderr.count(b"\n")) == (1, 1)
        assert b"cannot write: No space left on device" in shown.stderr

    def test_interruption(self) -> None:
        code = """
import os, signal
from gcx import __main__
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
__main__.look_up = lambda _: os.kill(os.getpid(), signal.SIGINT)
__main__.exit_after(__main__.main)
"""
        shown = ran("-c", code)
        assert (shown.returncode, shown.stdout, shown.stderr) == (130, b"", b"")


def ran(
    *arguments: str, folder: Path = HERE, output: int | IO[str] = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """Run Python without whatever else is on the path, so that the folder's gcx is found."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=output, stderr=subprocess.PIPE, check=False
    )
