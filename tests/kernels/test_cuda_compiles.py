"""The CUDA kernel, compiled for GPUs that are not here, as CuPy compiles it: what they will do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("cupy")
pytest.importorskip("triton")

import triton
from cupy_backends.cuda.libs import nvrtc

from gcx.backends import _cupy_kernels
from gcx.backends._cupy_kernels import PER_THREAD

from planted import replaced

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"  # headers of CUDA, and tools

OF_CUPY = ("-ftz=true", "--device-as-default-execution-space")  # it adds these to our options

# How often the source moves a share of a tile: rows in four ways, long rows, columns and panels are
# stored; a long row is read a second time.
STORES = 7
LOADS = 8


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", _cupy_kernels.ELEMENTS)
def test_nothing_to_find(dtype: str, architecture: int, tmp_path: Path) -> None:
    options = _cupy_kernels.options(dtype)
    found = findings(_cupy_kernels.source(), dtype, architecture, options, tmp_path)
    assert list(found) == []


def with_operators_of_c(source: str) -> str:
    asm = re.compile(r"number result;.*?return result;", re.DOTALL)
    changed, count = asm.subn("return a sign b;", source)
    assert count == 1
    return changed


@pytest.mark.parametrize(
    ("edit", "symptom"),
    [
        (with_operators_of_c, "flushes subnormal numbers"),
        (replaced("div.rn.f32", "div.full.f32"), "divides approximately"),
        (replaced("sizeof(Wide) == 8 ? 2 : 3", "8"), "stack"),
        (replaced("alignas(16) ", ""), "128-bit"),
        (replaced("__launch_bounds__(THREADS, BLOCKS)", ""), "registers"),
        (replaced("const int run =", "const int run, unused ="), "does not compile"),
    ],
)
def test_a_fault_is_found(edit: Callable[[str], str], symptom: str, tmp_path: Path) -> None:
    source = edit(_cupy_kernels.source())
    found = findings(source, "float32", 90, _cupy_kernels.options("float32"), tmp_path)
    assert any(symptom in finding for finding in found)


def test_contraction_is_found_and_can_be_forbidden(tmp_path: Path) -> None:
    product = "share[k * V + v] - means[v] * Wide(0.5)"
    source = replaced("subtract(share[k * V + v], means[v])", product)(_cupy_kernels.source())
    options = _cupy_kernels.options("float64")
    assert "contracts" not in findings(source, "float64", 90, options, tmp_path)
    options = tuple(option for option in options if option != "--fmad=false")
    assert "contracts" in findings(source, "float64", 90, options, tmp_path)


def findings(
    source: str, dtype: str, architecture: int, options: Sequence[str], folder: Path
) -> Iterator[str]:
    """What is wrong with the program that the compiler makes of a kernel."""
    program = nvrtc.createProgram(source, "centralize.cu", (), ())
    target = (f"-arch=sm_{architecture}", f"-I{NVIDIA / 'include'}")
    try:
        nvrtc.compileProgram(program, (*options, *OF_CUPY, *target))
    except nvrtc.NVRTCError:
        yield f"does not compile: {nvrtc.getProgramLog(program)}"
        return
    yield from filter(None, [nvrtc.getProgramLog(program)])
    ptx = nvrtc.getPTX(program).decode()
    forbidden = {
        # Without a rounding mode the next compiler may make a multiplication and a sum into one.
        r"\bfma\.|\b(add|sub|mul)(\.ftz)?\.f(32|64)\b": "contracts",
        r"\bdiv\.(full|approx)": "divides approximately",
        r"\b(add|sub|mul|div|cvt)\.\S*ftz": "flushes subnormal numbers",
    }
    yield from (what for pattern, what in forbidden.items() if re.search(pattern, ptx))

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(nvrtc.getCUBIN(program) + b"\0")  # which the binding cuts off
    usage = dict(re.findall(r"([A-Z]+):(\d+)", _printed("cuobjdump", "-res-usage", cubin)))
    most_registers = 128 if dtype == "float64" else 80
    if int(usage["REG"]) > most_registers:
        yield f"{usage['REG']} registers"
    if int(usage["STACK"]) or int(usage["LOCAL"]):
        yield f"a stack of {usage['STACK']} bytes"
    instructions = _printed("nvdisasm", "-c", cubin)
    packs = PER_THREAD * (16 if dtype == "float64" else 8 if dtype == "float32" else 4) // 32
    for instruction, least in (("LDG", LOADS), ("STG", STORES)):
        count = len(re.findall(rf"\b{instruction}\.E\S*\.128\b", instructions))
        if count < least * packs:
            yield f"{count} times {instruction} of 128-bit, not {least * packs}"


def _printed(tool: str, *arguments: str | Path) -> str:
    command = [NVIDIA / "bin" / tool, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
