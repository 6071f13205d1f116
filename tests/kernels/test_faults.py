"""Faults planted in kernels.cu: each is found by the check that is there for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import emulated_cuda
from emulated_cuda import EmulatedDriver
from launched import SOURCE, Matrix, Variant, check, negative_zeros
from test_compiled import compile_kernel, findings

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

ROWS, COLUMNS = [Matrix(9, 64), Matrix(7, 1000), Matrix(3, 1100)], [Matrix(33, 64), Matrix(64, 128)]
FAR = 40_000  # a wild write should hit an array
SPLIT = [Matrix(33, 700), Matrix(32, 1024)]
LONG = [Matrix(2, 16400), Matrix(2, 40000)]
FLAT = [Matrix(1, 9000), Matrix(1, 64)]
MISALIGNED = [Matrix(9, 64, shift=1), Matrix(3, 1100, shift=1)]
PADDING = "0x80008000u : sizeof(E) == 4 ? 0x80000000u : 0u"  # of negative zeros
PRODUCT = "fma(n[2], x[2], fma(-n[2], g, g))"
ROUNDED = "n[2] * x[2] + fma(-n[2], g, g)"

# A launch, and faults that its bits show: what is there, and what stands in its place.
WRONG_BITS: list[tuple[str, str, list[Matrix], dict[str, str]]] = [
    (
        *("rows", "Store", ROWS),
        {
            "= sums[0];\n    __syncthreads();": "= sums[0];",
            "upper ? sums[n] : sums[n + N / 2]": "upper ? sums[n + N / 2] : sums[n]",
            "return tree<N, 2 * STEP>(number, k) + tree<N, 2 * STEP>(number, k + STEP);": (
                "return tree<N / 2>(number, 2 * k) + tree<N / 2>(number, 2 * k + 1);"
            ),
            PADDING: "0u : 0u",
            "v * next < left;": "v * next <= left;",
            "sum / static_cast<Wide>(fan_in)": "sum * (1 / static_cast<Wide>(fan_in))",
            "[middle] <= tile": "[middle] < tile",
            "unit < matrix.units ? matrix.fan_in : 0": "matrix.fan_in",
        },
    ),
    (
        *("rows", "Store", MISALIGNED),
        {
            "for (int half = from; half >= to; half /= 2) x += other_lane(x, half);": (
                "for (int half = to; half <= from; half *= 2) x += other_lane(x, half);"
            )
        },
    ),
    (
        *("rows", "Store", [Matrix(9, 64), Matrix(9, 64, shift=2)]),
        {"EACH(r, Rule::ROLES) all |=": "FROM(r, 1, 2) all |="},
    ),
    ("rows", "Store", [Matrix(9, 63)], {"all % 16 == 0 && sizes % V == 0": "all % 16 == 0"}),
    ("long_rows", "Store", LONG, {"shared + start / SEGMENT % 2 * T": "shared"}),
    (
        *("columns", "Store", COLUMNS),
        {
            "= means[i];\n      }\n      __syncthreads();": "= means[i];\n      }",
            "work);\n    __syncthreads();\n    EACH(v, V) means[v] = shared": (
                "work);\n    EACH(v, V) means[v] = shared"
            ),
            "v * next < columns;": "v * next <= columns;",
        },
    ),
    ("columns", "Store", [Matrix(33, 65)], {"k * apart < rows &&": "k * apart <= rows &&"}),
    ("split columns", "Store", [Matrix(33, 33000)], {"if (segment) __syncthreads();": ""}),
    ("flat", "AdamW", FLAT, {PRODUCT: ROUNDED}),
    ("flat", "SgdMomentum", FLAT, {"const double buffer = n[4]": "const float buffer = n[4]"}),
    ("flat", "SgdRate", FLAT, {"fma(rate, double(x[1]), double(g))": "fma(float(rate), x[1], g)"}),
]


def planted(text: str, fault: str) -> str:
    assert SOURCE.count(text) == 1, f"{SOURCE.count(text)} times in the source: {text}"
    return SOURCE.replace(text, fault)


@pytest.mark.parametrize(
    ("kernel", "rule", "matrices", "text", "fault"),
    [(*launch, *fault) for *launch, faults in WRONG_BITS for fault in faults.items()],
)
def test_bits_show(kernel: str, rule: str, matrices: Any, text: str, fault: str) -> None:
    variant = Variant(kernel, rule, "float32")
    drivers = [EmulatedDriver(), EmulatedDriver(falling=True)]
    fill = negative_zeros if text == PADDING else None
    check(drivers, variant, matrices, fill=fill, margin=FAR)
    with pytest.raises((AssertionError, RuntimeError), match=r"elements differ|misaligned"):
        check(drivers, variant, matrices, source=planted(text, fault), fill=fill, margin=FAR)


# Faults that a compiled program shows, by what is counted in it.
IN_PROGRAMS: list[tuple[str, str, str, str]] = [
    (
        *("rows-StoreRate-float32", "spills"),
        *("BLOCKS = HAS_RATE ? (sizeof(E) > 2 ? 3 : 2) : 4", "BLOCKS = 8"),
    ),
    (
        *("long_rows-AdamW-bfloat16", "registers"),
        *("__launch_bounds__(KERNEL<RULE>::THREADS, KERNEL<RULE>::BLOCKS)", ""),
    ),
    ("columns-Store-bfloat16", "spills", "EACH(w, 4) OPAQUE(pack.words[w]);", ""),
    ("rows-Store-float32", "16-byte loads", "struct alignas(16) Pack", "struct Pack"),
    ("rows-Store-float32", "16-byte loads", "HOLD = !HAS_RATE", "HOLD = false"),
    (
        *("rows-Store-float32", "approximations"),
        *("sum / static_cast<Wide>(fan_in)", "__fdividef(sum, fan_in)"),
    ),
    ("flat-AdamW-float32", "fused operations", PRODUCT, ROUNDED),
]


@pytest.mark.parametrize(("variant", "found_by", "text", "fault"), IN_PROGRAMS)
def test_programs_show(variant: str, found_by: str, text: str, fault: str) -> None:
    compiled = Variant(*variant.split("-"))
    assert found_by in findings(compiled, compile_kernel(planted(text, fault), compiled.options()))


OPTIONS = {"-fmad=true": "contraction", "-ftz=true": "flushed subnormal numbers"}
OPTIONS["-prec-div=false"] = "approximations"


@pytest.mark.parametrize("option", OPTIONS)
def test_programs_show_an_option(option: str) -> None:
    variant = Variant("flat", "AdamW", "float32")
    options = [o for o in variant.options() if o != "--fmad=false"]
    given = [*options, option] + ["--fmad=false"] * (option != "-fmad=true")
    assert OPTIONS[option] in findings(variant, compile_kernel(SOURCE, given))


# Memory without margins, so that a sanitizer watches all of it. The table is for subprocesses.
TIGHT: list[tuple[str, list[Matrix]]] = [
    ("rows", [*ROWS, Matrix(5, 63), *MISALIGNED]),
    ("long_rows", LONG),
    ("columns", [*COLUMNS, Matrix(7, 9), Matrix(33, 65, shift=1)]),
    ("split columns", SPLIT),
    ("flat", FLAT),
]
SANITIZED = (("Store", "float32"), ("AdamW", "bfloat16"), ("SgdMomentumRate", "float64"))

WILD = {
    "": "",
    "v * next < left;": "v * next <= left;",
    "unit < matrix.units ? matrix.fan_in : 0": "matrix.fan_in",
    "SHARED(Wide, shared, 2 * T);": "SHARED(Wide, shared, T);",
    "SHARED(Wide, shared, SIZE + C);": "SHARED(Wide, shared, SIZE);",
    "? partials[(segment + split) * C + c]": "? partials[(segment + split + 1) * C + c]",
    "split < splits ?": "split <= splits ?",
}


@pytest.mark.parametrize("text", WILD)
def test_sanitizers(text: str) -> None:
    """Only a fault is reported. The sanitizers of addresses must be there before Python is."""
    find = [emulated_cuda.COMPILER[0], "-print-file-name=libasan.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import test_faults as t; t.run_sanitized({text!r})"],
        env={
            **os.environ,
            "LD_PRELOAD": library,
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": os.pathsep.join(map(str, (folder.parents[1], folder.parent, folder))),
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if text:
        assert "ERROR: AddressSanitizer" in done.stderr or "runtime error" in done.stderr, done
    else:
        assert done.returncode == 0, done.stderr


def run_sanitized(text: str) -> None:
    source = planted(text, WILD[text]) if text else SOURCE
    for kernel, matrices in TIGHT:
        for rule, dtype in SANITIZED[: 1 if text else None]:
            driver = EmulatedDriver(emulated_cuda.SANITIZED)
            check([driver], Variant(kernel, rule, dtype), matrices, source=source, margin=0)
