"""Faults planted in kernels.cu: each is found by the check that is there for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import emulated_cuda
from compiled import compile_kernel
from emulated_cuda import EmulatedDriver
from launched import SOURCE, Matrix, Variant, check, negative_zeros
from test_compiled import findings

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

ROWS, COLUMNS = [Matrix(9, 64), Matrix(7, 1000), Matrix(3, 1100)], [Matrix(33, 64), Matrix(64, 128)]
FAR = 40_000  # a wild write should hit an array
SPLIT = [Matrix(33, 700), Matrix(32, 1024)]
LONG = [Matrix(2, 16400), Matrix(2, 40000)]
FLAT = [Matrix(1, 9000), Matrix(1, 64)]
MISALIGNED = [Matrix(9, 64, shift=1), Matrix(3, 1100, shift=1)]

# What is there, its fault, and a launch whose bits show it.
WRONG_BITS: dict[str, tuple[str, str, str, str, list[Matrix]]] = {
    "no barrier before sums are read": (
        "= sums[0];\n    __syncthreads();",
        "= sums[0];",
        *("rows", "Store", ROWS),
    ),
    "no barrier between columns' sums": (
        "= means[i];\n      }\n      __syncthreads();",
        "= means[i];\n      }",
        *("columns", "Store", COLUMNS),
    ),
    "no barrier before the means": (
        "work);\n    __syncthreads();\n    EACH(v, V) means[v] = shared",
        "work);\n    EACH(v, V) means[v] = shared",
        *("columns", "Store", COLUMNS),
    ),
    "no barrier between segments of columns": (
        "if (segment) __syncthreads();",
        "",
        *("split columns", "Store", [Matrix(33, 33000)]),
    ),
    "segments share one half": (
        "shared + start / SEGMENT % 2 * T",
        "shared",
        *("long_rows", "Store", LONG),
    ),
    "another deal": (
        "upper ? sums[n] : sums[n + N / 2]",
        "upper ? sums[n + N / 2] : sums[n]",
        *("rows", "Store", ROWS),
    ),
    "lanes in another order": (
        "for (int half = from; half >= to; half /= 2) x += other_lane(x, half);",
        "for (int half = to; half <= from; half *= 2) x += other_lane(x, half);",
        *("rows", "Store", MISALIGNED),
    ),
    "neighbours are added first": (
        "return tree<N, 2 * STEP>(number, k) + tree<N, 2 * STEP>(number, k + STEP);",
        "return tree<N / 2>(number, 2 * k) + tree<N / 2>(number, 2 * k + 1);",
        *("rows", "Store", ROWS),
    ),
    "padded with 0.0": (
        "0x80008000u : sizeof(E) == 4 ? 0x80000000u : 0u",
        "0u : 0u",
        "rows",
        "Store",
        ROWS,
    ),
    "one element too many": ("v * next < left;", "v * next <= left;", "rows", "Store", ROWS),
    "one row too many": (
        "k * apart < rows &&",
        "k * apart <= rows &&",
        *("columns", "Store", [Matrix(33, 65)]),
    ),
    "one column too many": (
        "v * next < columns;",
        "v * next <= columns;",
        *("columns", "Store", COLUMNS),
    ),
    "alignment of one array alone": (
        "EACH(r, Rule::ROLES) all |=",
        "FROM(r, 1, 2) all |=",
        *("rows", "Store", [Matrix(9, 64), Matrix(9, 64, shift=2)]),
    ),
    "sizes are not looked at": (
        "all % 16 == 0 && sizes % V == 0",
        "all % 16 == 0",
        *("rows", "Store", [Matrix(9, 63)]),
    ),
    "a product that is rounded": (
        "fma(n[2], x[2], fma(-n[2], g, g))",
        "n[2] * x[2] + fma(-n[2], g, g)",
        *("flat", "AdamW", FLAT),
    ),
    "a buffer that is rounded": (
        "const double buffer = n[4]",
        "const float buffer = n[4]",
        *("flat", "SgdMomentum", FLAT),
    ),
    "decay in float32": (
        "fma(rate, double(x[1]), double(g))",
        "fma(float(rate), x[1], g)",
        *("flat", "SgdRate", FLAT),
    ),
    "a mean by the reciprocal": (
        "sum / static_cast<Wide>(fan_in)",
        "sum * (1 / static_cast<Wide>(fan_in))",
        *("rows", "Store", ROWS),
    ),
    "another matrix": ("[middle] <= tile", "[middle] < tile", "rows", "Store", ROWS),
    "units that are not there": (
        "unit < matrix.units ? matrix.fan_in : 0",
        "matrix.fan_in",
        *("rows", "Store", ROWS),
    ),
}


def planted(text: str, fault: str) -> str:
    assert SOURCE.count(text) == 1, f"{SOURCE.count(text)} times in the source: {text}"
    return SOURCE.replace(text, fault)


@pytest.mark.parametrize("name", WRONG_BITS)
def test_bits_show(name: str) -> None:
    text, fault, kernel, rule, matrices = WRONG_BITS[name]
    variant = Variant(kernel, rule, "float32")
    drivers = [EmulatedDriver(), EmulatedDriver(falling=True)]
    fill = negative_zeros if "0.0" in name else None
    check(drivers, variant, matrices, fill=fill, margin=FAR)
    with pytest.raises((AssertionError, RuntimeError), match=r"elements differ|misaligned"):
        check(drivers, variant, matrices, source=planted(text, fault), fill=fill, margin=FAR)


IN_PROGRAMS: dict[str, tuple[str, str, Variant, str]] = {
    "few registers": (
        "BLOCKS = HAS_RATE ? (sizeof(E) > 2 ? 3 : 2) : 4",
        "BLOCKS = 8",
        Variant("rows", "StoreRate", "float32"),
        "spills",
    ),
    "no bounds": (
        "__launch_bounds__(KERNEL<RULE>::THREADS, KERNEL<RULE>::BLOCKS)",
        "",
        Variant("long_rows", "AdamW", "bfloat16"),
        "registers",
    ),
    "widened numbers are held": (
        "EACH(w, 4) OPAQUE(pack.words[w]);",
        "",
        Variant("columns", "Store", "bfloat16"),
        "spills",
    ),
    "packs without alignment": (
        "struct alignas(16) Pack",
        "struct Pack",
        Variant("rows", "Store", "float32"),
        "16-byte loads",
    ),
    "a needless read": (
        "HOLD = !HAS_RATE",
        "HOLD = false",
        Variant("rows", "Store", "float32"),
        "16-byte loads",
    ),
    "an approximate division": (
        "sum / static_cast<Wide>(fan_in)",
        "__fdividef(sum, fan_in)",
        Variant("rows", "Store", "float32"),
        "approximations",
    ),
    "a product that is rounded": (
        "fma(n[2], x[2], fma(-n[2], g, g))",
        "n[2] * x[2] + fma(-n[2], g, g)",
        Variant("flat", "AdamW", "float32"),
        "fused operations",
    ),
}


@pytest.mark.parametrize("name", IN_PROGRAMS)
def test_programs_show(name: str) -> None:
    text, fault, variant, found_by = IN_PROGRAMS[name]
    assert found_by in findings(variant, compile_kernel(planted(text, fault), variant.options()))


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
        [
            sys.executable,
            "-c",
            "import sys, test_faults as t; t.run_sanitized(*sys.argv[1:])",
            text,
        ],
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
