"""Faults in the Triton kernels and their launch, each found by the check that is there for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from planted import copy_with_fault
from triton_programs import Case, compile_all, flaws

KERNELS = "backends/_triton_kernels.py"
FUNCTIONS = "backends/_triton_functions.py"
HOST = "backends/_torch_triton.py"
TILES = "backends/_tiles.py"

_NO_FUSION = '"enable_fp_fusion": False'


class Fault(NamedTuple):
    file: str
    text: str
    fault: str
    found_by: str  # a kind of flaws, or tests


IN_PROGRAMS = {
    "fused": Fault(HOST, _NO_FUSION, '"enable_fp_fusion": True', "arithmetic"),
    "approximate division": Fault(FUNCTIONS, "tl.div_rn(x, y)", "x / y", "arithmetic"),
    "approximate root": Fault(FUNCTIONS, "tl.sqrt_rn(second)", "tl.sqrt(second)", "arithmetic"),
    "unknown alignment": Fault(FUNCTIONS, "tl.multiple_of(pointer, 16)", "pointer", "accesses"),
    "unknown steps": Fault(
        FUNCTIONS, "tl.multiple_of(tl.load(pointer), VECTOR)", "tl.load(pointer)", "accesses"
    ),
    "needless read": Fault(
        FUNCTIONS,
        "write(roles[2], place, mask, grad)",
        "write(roles[2], place, mask, grad + 0 * values[3])",
        "accesses",
    ),
    "reads that are not for the sums": Fault(
        KERNELS,
        "    if parts == 1:\n        values = read_all(roles, place, mask)\n",
        "    values = read_all(roles, place, mask)\n    if parts == 1:\n",
        "accesses",
    ),
    "relaxed order": Fault(KERNELS, 'sem="acq_rel"', 'sem="relaxed"', "order"),
    "counts before it leaves its sums": Fault(
        KERNELS,
        """
        _store_sums(partials, slot + part, grad_sum, weight_sum, WIDTH)
        if _is_last(arrivals + slot, parts):
""",
        """
        is_last = _is_last(arrivals + slot, parts)
        _store_sums(partials, slot + part, grad_sum, weight_sum, WIDTH)
        if is_last:
""",
        "order",
    ),
    "few registers": Fault(HOST, _NO_FUSION, f'{_NO_FUSION}, "maxnreg": 64', "spilled"),
    "large tiles": Fault(TILES, "\nTILE = 4096", "\nTILE = 16384", "registers"),
}

IN_ADAMW = ("approximate root", "few registers", "reads that are not for the sums")


@pytest.mark.parametrize("name", IN_PROGRAMS)
def test_in_programs(name: str, tmp_path: Path) -> None:
    file, text, fault, found_by = IN_PROGRAMS[name]
    copy_with_fault(tmp_path, file, text, fault)
    case = Case("adamw" if name in IN_ADAMW else "centralize", "float32", "even", 90)
    (program,) = compile_all([case], tmp_path).values()
    assert list(flaws(case, program)) == [found_by], program


SHAPES = "test_triton_interpreted.py::test_many_shapes_in_one_list[torch.float32]"
AGAIN = "test_torch_cuda_host.py::test_a_second_launch_finds_counters_at_zero"
IN_RESULTS = {
    "neighbours are added first": Fault(
        FUNCTIONS,
        "halves = tl.reshape(x, (BEFORE, 2, LENGTH // 2 * AFTER))",
        "halves = tl.reshape(x, (BEFORE * (LENGTH // 2), 2, AFTER))",
        SHAPES,
    ),
    "one element too many": Fault(
        KERNELS,
        "return read(role, start + _within(matrix, element, GATHER), element < fan_in)",
        "return read(role, start + _within(matrix, element, GATHER), element <= fan_in)",
        SHAPES,
    ),
    "a tile of columns takes neighbours": Fault(
        KERNELS, "part % splits + splits * row", "part % splits * HEIGHT + row", SHAPES
    ),
    "all is read for the sums of columns": Fault(
        KERNELS,
        "summed = (read(roles[0], place, mask), read(roles[1], place, mask))",
        "summed = read_all(roles, place, mask)",
        "test_triton_traffic.py",
    ),
    "counter is not reset": Fault(KERNELS, "tl.store(counter, 0)", "tl.store(counter, 1)", AGAIN),
}


@pytest.mark.parametrize("name", IN_RESULTS)
def test_in_results(name: str, tmp_path: Path) -> None:
    file, text, fault, found_by = IN_RESULTS[name]
    copy_with_fault(tmp_path, file, text, fault)
    test = Path(__file__).with_name(found_by)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--backends=numpy", test],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "AssertionError" in done.stdout
