"""Failures of a compiler, a driver or a cache: one warning, and the library's own operations."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gcx
from gcx.__main__ import look_up
from gcx.backends.cuda import launcher

from emulated_libraries import CupyOnCpu, make
from kernel_cases import Case, canonical
from same_bits import assert_same_bits

# Rows, then columns of two kernels.
CASES = [Case((6, 50), (1,)), Case((300, 40), (0,))]
LAYOUTS = ["oi", "io"]

Patch = pytest.MonkeyPatch


def run(library: CupyOnCpu, *, in_place: bool = True) -> None:
    """Centralize a list, and compare all bits."""
    wholes, grads = map(list, zip(*(make(library, c, "float32") for c in CASES), strict=True))
    expected = [canonical(whole, case) for whole, case in zip(wholes, CASES, strict=True)]
    results = gcx.centralize_many(
        grads, layouts=LAYOUTS, out=grads if in_place else None, reproducible=True
    )
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(library.numpy(result), wanted)


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


FAILURES = {
    "compiler": ("compile", RuntimeError("NVRTC_ERROR_COMPILATION: kernels.cu(3): error\nmore")),
    "no compiler": ("compile", OSError("libnvrtc.so.13: cannot open shared object file")),
    "bindings": ("compile", AttributeError("module has no attribute 'nvrtcGetCUBIN'")),
    "loader": ("load", RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")),
    "launch": ("launch", RuntimeError("CUDA_ERROR_INVALID_VALUE")),
    "text is empty": ("launch", AssertionError()),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("method", "error"), FAILURES.values(), ids=FAILURES)
def test_failure_is_told_once(
    library: CupyOnCpu, method: str, error: Exception, in_place: bool, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(library.driver, method, fail_with(error))
    with pytest.warns(RuntimeWarning, match="cannot run on cuda:") as told:
        run(library, in_place=in_place)
    reason = f"{type(error).__name__}: {error}".partition("\n")[0].strip()
    (warning,) = told
    assert str(warning.message).endswith(f"slower operations do their work: {reason}")
    with warnings.catch_warnings(action="error"):
        run(library, in_place=in_place)
    assert not library.driver.launches
    _, grad = make(library, CASES[0], "float32")
    assert library.backend.why_no_kernels(grad) == reason


# As the driver, the runtime and torch say it.
CAPTURES = (
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
    "cudaErrorStreamCaptureImplicit: operation would make the legacy stream depend on a capture",
    "CUDA error: operation not permitted when stream is capturing",
)


@pytest.mark.parametrize("text", [*CAPTURES, "ERROR_OUT_OF_MEMORY", "CUDA error: out of memory"])
def test_nothing_is_switched_off(library: CupyOnCpu, text: str, monkeypatch: Patch) -> None:
    warns = pytest.warns(RuntimeWarning, match="make one step before the capture")
    with warns if text in CAPTURES else pytest.raises(MemoryError), monkeypatch.context() as patch:
        patch.setattr(library.driver, "launch", fail_with(RuntimeError(text)))
        run(library)
    run(library)
    assert library.driver.launches


@pytest.mark.parametrize("failing", ["rows", "column_sums", "split_columns"])
def test_failure_of_some_kernels(library: CupyOnCpu, failing: str, monkeypatch: Patch) -> None:
    """Each array is centralized once: by its kernels, or by the library."""
    launch = library.driver.launch

    def fail(device: int, function: Any, *rest: Any) -> None:
        if function.kernel == failing:
            fail_with(RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"))()
        launch(device, function, *rest)

    monkeypatch.setattr(library.driver, "launch", fail)
    with pytest.warns(RuntimeWarning, match="LAUNCH_OUT_OF_RESOURCES"):
        run(library)


@pytest.mark.parametrize("method", ["compile", "load", "allocate"])
def test_lack_of_memory_is_raised_and_nothing_is_done(
    library: CupyOnCpu, method: str, monkeypatch: Patch
) -> None:
    run(library)
    before = len(library.driver.launches)
    wholes, grads = zip(*(make(library, case, "float16") for case in CASES), strict=True)
    expected = [whole.copy() for whole in wholes]
    real = getattr(library.driver, method, None)

    def fail_late(*arguments: Any) -> Any:
        """The kernel for rows is there, and those for columns are not."""
        if "column_sums" in str(arguments):
            fail_with(MemoryError("CUDA_ERROR_OUT_OF_MEMORY"))()
        assert real is not None
        return real(*arguments)

    with monkeypatch.context() as patch:
        if method == "allocate":
            library.lack_memory(patch)
        else:
            patch.setattr(library.driver, method, fail_late)
        errors = MemoryError, library.out_of_memory
        with warnings.catch_warnings(action="error"), pytest.raises(errors):
            gcx.centralize_many([*grads], layouts=LAYOUTS, out=[*grads])
    assert len(library.driver.launches) == before
    for whole, wanted in zip(wholes, expected, strict=True):
        assert_same_bits(whole, wanted)
    gcx.centralize_many([*grads], layouts=LAYOUTS, out=[*grads])  # there is memory again
    assert len(library.driver.launches) == before + 3


def count_compilations(library: CupyOnCpu, patch: Patch, folder: Path) -> int:
    """Run as a new process does."""
    compiled: list[object] = []
    fresh = type(library)(patch)
    patch.setenv("XDG_CACHE_HOME", str(folder))
    compile_kernel = fresh.driver.compile
    patch.setattr(fresh.driver, "compile", lambda *x: compiled.append(x) or compile_kernel(*x))
    run(fresh)
    assert len(fresh.driver.launches) == 3
    return len(compiled)


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda code: code[:-9],
    "changed": lambda code: code[:-1] + bytes([code[-1] ^ 1]),
    "empty": lambda code: b"",
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_spoiled_cache(library: CupyOnCpu, spoil: Any, monkeypatch: Patch, tmp_path: Path) -> None:
    counts = [count_compilations(library, monkeypatch, tmp_path) for _ in range(2)]
    files = [*tmp_path.glob("gcx/*")]
    assert len(files) == 3  # and no temporary ones
    for file in files:
        file.write_bytes(spoil(file.read_bytes()))
    counts += [count_compilations(library, monkeypatch, tmp_path) for _ in range(2)]
    assert counts == [3, 0, 3, 0]


def is_a_file(patch: Patch, folder: Path) -> None:
    (folder / "file").touch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def is_full(patch: Patch, folder: Path) -> None:
    """Half of a file is written."""
    write = Path.write_bytes

    def fail(self: Path, code: bytes) -> int:
        write(self, code[: len(code) // 2])
        raise OSError(28, "No space left on device")

    patch.setattr(Path, "write_bytes", fail)


def has_no_home(patch: Patch, folder: Path) -> None:
    patch.delenv("XDG_CACHE_HOME")
    patch.setattr(Path, "home", fail_with(RuntimeError("Could not determine home directory.")))


@pytest.mark.parametrize("hinder", [is_a_file, is_full, has_no_home])
def test_no_cache(library: CupyOnCpu, hinder: Any, monkeypatch: Patch, tmp_path: Path) -> None:
    hinder(monkeypatch, tmp_path)
    with warnings.catch_warnings(action="error"):
        run(library)
    assert len(library.driver.launches) == 3
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("cuda.bindings", r"ImportError: .*\(pip install cuda-bindings\)$"),
        ("cuda.bindings.driver.cuDriverGetVersion", "OSError: no library$"),
        ("cuda.bindings.nvrtc.nvrtcVersion", "OSError: no library$"),
    ],
)
def test_no_driver(missing: str, reason: str, monkeypatch: Patch) -> None:
    if missing == "cuda.bindings":
        monkeypatch.setitem(sys.modules, missing, None)
    else:
        monkeypatch.setattr(missing, fail_with(OSError("no library\nmore")))
    driver = pytest.importorskip("gcx.backends._torch_driver")
    with pytest.warns(RuntimeWarning, match=f"cannot run, so the array .*: {reason}"):
        found = launcher.find_launcher(driver.Driver)
    assert isinstance(found, str)
    with pytest.raises(MemoryError):
        launcher.find_launcher(fail_with(MemoryError()))


@pytest.mark.parametrize(
    "name",
    [
        "torch._C._get_tracing_state",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._dynamo.guards.TensorGuards",
        "torch.autograd.forward_ad._current_level",
    ],
)
def test_torch_without_a_private_name(name: str, monkeypatch: Patch) -> None:
    torch = pytest.importorskip("torch")
    from gcx.backends import _torch, _torch_cuda  # noqa: F401 - to be restored

    monkeypatch.delitem(sys.modules, "gcx.backends._torch_cuda")
    monkeypatch.delattr("gcx.backends._torch_cuda")
    with monkeypatch.context() as patch:
        patch.delattr(name)
        from gcx.backends import _torch_cuda as made_anew
    monkeypatch.setattr(_torch, "is_for_kernels", lambda _: True)
    grad = torch.arange(12.0).reshape(3, 4) ** 2
    expected = grad - grad.mean(1, keepdim=True)
    with pytest.warns(RuntimeWarning, match=name.rpartition(".")[2]) as told:
        results = [gcx.centralize_many([grad], out=out)[0] for out in (None, [grad])]
    assert len(told) == 1
    assert all(torch.equal(result, expected) for result in results)
    assert name.rpartition(".")[2] in made_anew.find_launcher()


def test_cupy_without_nvrtc(monkeypatch: Patch) -> None:
    import cupy_stand_in

    cupy = cupy_stand_in.StandIn()
    error = RuntimeError("libnvrtc is not there")
    backend = cupy_stand_in.install(monkeypatch, cupy, fail_with(error))
    grad = np.arange(12.0).reshape(3, 4).view(cupy_stand_in.Array) ** 2
    with pytest.warns(RuntimeWarning, match="libnvrtc is not there"):
        found = [gcx.centralize(grad) for _ in range(2)]
    for result in found:
        np.testing.assert_allclose(result, grad - grad.mean(1, keepdims=True))
    assert backend.why_no_kernels(grad) == f"RuntimeError: {error}"


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU\nmore")])
def test_program_shows_the_reason(
    library: CupyOnCpu, error: Exception | None, monkeypatch: Patch
) -> None:
    if error is not None:
        monkeypatch.setattr(library.driver, "load", fail_with(error))
    asarray = library.backend.asarray
    device = {"torch": "cpu", "cupy": "cuda:0"}[library.name]
    monkeypatch.setattr(library.backend, "asarray", lambda x, kind, _: asarray(x, kind, device))
    monkeypatch.setattr(library.backend, "devices", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr("gcx.__main__.load", lambda _: library.backend)
    monkeypatch.setattr("gcx.__main__.find_spec", lambda _: True)
    with warnings.catch_warnings(action="error"):
        _, *said = look_up(library.name).how.split("; ")
    expected = ["on CUDA few launches of CUDA kernels for a list"]
    if error is not None:
        expected.append("not on cuda:0: RuntimeError: CUDA_ERROR_NO_BINARY_FOR_GPU")
    assert said == expected
    assert len(library.driver.launches) == (error is None)
