"""Train steps under `jax.jit` on eight devices: what GC adds to what they say to each other."""

from __future__ import annotations

from typing import Any

import pytest

import devices

pytest.importorskip("jax")
pytest.importorskip("optax")

pytestmark = pytest.mark.one_framework

# The collectives that GC adds, by the number of their elements: the means of a fan-in that is
# split, and nothing for one that is whole.
ADDED = {
    "mlp, whole": {},
    "mlp, fan-out": {},
    "mlp, fan-in": {"all-reduce 32": 1, "all-reduce 24": 1},
    "mlp, tensor parallel": {"all-reduce 24": 1},
    "mlp, fan-in and fan-out": {"all-reduce 16": 1, "all-reduce 12": 1},
    "mlp, over all devices": {"all-reduce 32": 1},
    "convolution, fan-out": {},
    "convolution, fan-in": {"all-reduce 16": 1},
    "query, fan-out": {},
    "query, fan-in": {"all-reduce 16": 1},
    "linear, fan-out": {},
    "linear, fan-in": {"all-reduce 24": 1},
}


# XLA divides a program in the same way for the devices of two processes: these stand for the rest.
IN_TWO_PROCESSES = ("mlp, fan-in", "mlp, tensor parallel", "convolution, fan-out")


@pytest.fixture(scope="module")
def seen() -> Any:
    return devices.seen_by("jax_train_steps.py")


@pytest.fixture(scope="module")
def seen_in_two() -> Any:
    return devices.seen_by("jax_train_steps.py", *IN_TWO_PROCESSES, processes=2)


def check(facts: Any, case: str) -> None:
    assert (facts["added"], facts["gone"]) == (ADDED[case], {}), "the means, and no gradient"
    assert facts["smallest move"] > 1e-2
    assert facts["error"] < 1e-6
    assert facts["keeps sharding"]


def test_every_case_ran(seen: Any) -> None:
    assert list(seen) == list(ADDED)


@pytest.mark.parametrize("case", ADDED)
def test_steps(seen: Any, case: str) -> None:
    check(seen[case], case)


@pytest.mark.parametrize("case", IN_TWO_PROCESSES)
def test_steps_in_two_processes(seen_in_two: Any, case: str) -> None:
    check(seen_in_two[case], case)
