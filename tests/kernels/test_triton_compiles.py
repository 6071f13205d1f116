"""The Triton kernels as GPUs will run them, compiled for three generations of them.

Each operation is rounded once, as the canonical order needs it. Memory is accessed 16 bytes at a
time, no more often than needed, and registers allow for enough of that at once.
"""

from __future__ import annotations

from functools import cache

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from triton_programs import Case, Program, compile_all, flaws

# A100; H100 and H200; B200. They differ in how their compiler uses registers.
ARCHS = (80, 90, 100)
RULES = ("centralize", "coupled", "sgd", "momentum", "adamw")
EXTREMES = ("centralize", "adamw")  # of what a rule reads and keeps in registers


def cases() -> list[Case]:
    """Every rule; every dtype; every kind of tensors; the fewest and most registers everywhere."""
    others = [
        *((rule, "float32", "even", 90) for rule in RULES if rule not in EXTREMES),
        *((rule, "bfloat16", "even", 90) for rule in EXTREMES),
        *(("centralize", dtype, "even", 90) for dtype in ("float16", "float64")),
        *(("centralize", "float32", tensors, 90) for tensors in ("shifted", "odd")),
        ("centralize", "bfloat16", "shifted", 90),
        ("centralize", "float64", "odd", 90),
        *(("centralize", "float32", "odd", arch) for arch in (80, 100)),
        *((rule, "float32", "odd", 90) for rule in ("momentum", "adamw")),
        ("adamw", "float32", "shifted", 90),
    ]
    return [
        *(Case(rule, "float32", "even", arch) for arch in ARCHS for rule in EXTREMES),
        *(Case(*other) for other in others),
    ]


@cache
def programs(arch: int) -> dict[Case, Program]:
    return compile_all([case for case in cases() if case.arch == arch])


@pytest.mark.parametrize("case", cases(), ids=str)
def test_program(case: Case) -> None:
    program = programs(case.arch)[case]
    assert flaws(case, program) == {}, program
