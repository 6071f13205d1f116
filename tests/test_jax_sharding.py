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


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def seen(request: pytest.FixtureRequest) -> Any:
    return devices.seen_by("jax_train_steps.py", processes=request.param)


def test_every_case_ran(seen: Any) -> None:
    assert list(seen) == list(ADDED)


@pytest.mark.parametrize("case", ADDED)
class TestSteps:
    def test_communicates_the_means_and_no_gradient(self, seen: Any, case: str) -> None:
        assert (seen[case]["added"], seen[case]["gone"]) == (ADDED[case], {})

    def test_is_right(self, seen: Any, case: str) -> None:
        assert seen[case]["smallest move"] > 1e-2
        assert seen[case]["error"] < 1e-6

    def test_keeps_sharding(self, seen: Any, case: str) -> None:
        assert seen[case]["keeps sharding"]
