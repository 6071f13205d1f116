"""GC of gradients in parts: `axis_name`, and what is refused since nobody said how it is split."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import devices
from reference import centralized

pytest.importorskip("jax")
pytest.importorskip("optax")

import jax
import optax
from jax.sharding import PartitionSpec as P

import gcx.optax

pytestmark = pytest.mark.one_framework

# What is communicated to centralize a kernel of shape (16, 24) on a mesh of 4 x 2 devices.
COLLECTIVES = {
    "fan-in": {"all-reduce 24": 1},
    "fan-in, by path": {"all-reduce 24": 1},
    "fan-in, unchecked": {"all-reduce 24": 1},
    "fan-in over two axes": {"all-reduce 24": 1},
    "fan-in over two axes, one automatic": {"all-reduce 24": 1},
    "fan-in and fan-out": {"all-reduce 12": 1},
    "fan-in, one element a device": {"all-reduce 6": 1},
    "fan-in of one element": {},
    "fan-in, bfloat16": {"all-reduce 24": 1},
    "fan-out": {},
    "fan-out, unchecked": {},
    "whole": {},
    "whole, told": {},
    "whole, fan-in of one, told": {},
    "averaged, then centralized": {"all-reduce 384": 1},  # the gradient, by the test itself
    "centralized, then averaged": {"all-reduce 384": 1},
    "derivative": {"all-reduce 24": 2},
    "pmap, fan-in": {"all-reduce 24": 1},
    "pmap, averaged": {"all-reduce 384": 1},
    "explicit, whole": {},
    "explicit, fan-in": {"all-reduce 24": 1},
    "explicit, fan-out": {},
    "explicit, fan-in and fan-out": {"all-reduce 12": 1},
}
UNTOLD = (
    "dense/kernel: this gradient differs along the mesh axis 'x', and its fan-in may be split over "
    "it. If it is, give axis_name={'dense/kernel': 'x'}; if each device holds a whole fan-in, "
    "axis_name={'dense/kernel': None}"
)
RAISES = {
    "fan-in, untold": UNTOLD,
    "fan-out, untold": UNTOLD,
    "not averaged, untold": UNTOLD,
    "wrong name": "dense/kernel: axis_name ('z',) is not bound here.",
}


@pytest.fixture(scope="module")
def seen() -> Any:
    return devices.seen_by("jax_shards.py")


def test_every_case_ran(seen: Any) -> None:
    assert seen.keys() == COLLECTIVES.keys() | RAISES.keys()


@pytest.mark.parametrize("case", COLLECTIVES)
def test_is_right_and_communicates_the_means(seen: Any, case: str) -> None:
    half_ulp = 2.0**-7  # of a bfloat16 from 2 to 4
    assert max(seen[case]["error"]) < (half_ulp if "bfloat16" in case else 1e-6)
    assert seen[case]["collectives"] == COLLECTIVES[case]
    assert seen[case]["keeps"]


@pytest.mark.parametrize("case", RAISES)
def test_an_error_and_no_wrong_answer(seen: Any, case: str) -> None:
    assert seen[case]["raises"].startswith(RAISES[case])


def random(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


# Four parts of each.
GRADS = {"up": {"kernel": random(4, 3, 4)}, "down": {"kernel": random(4, 4, 2)}}


@pytest.mark.parametrize(
    "axis_name",
    [
        {"up/kernel": None, "down/kernel": "parts"},
        {"down/*": "parts"},
        {"up/*": (), "*": ("parts",)},
    ],
)
def test_each_parameter_is_split_in_its_own_way(axis_name: Any) -> None:
    """A named axis of `jax.vmap` stands for the devices; tensor parallel."""
    optimizer = gcx.optax.centralize("flax", axis_name=axis_name)
    optimizer.init(GRADS)
    update = partial(optimizer.update, state=optax.EmptyState())
    updates, _ = jax.vmap(update, axis_name="parts")(GRADS)
    for part in range(4):
        np.testing.assert_allclose(
            updates["up"]["kernel"][part],
            centralized(GRADS["up"]["kernel"][part], (0,)),
            atol=1e-6,
        )
    np.testing.assert_allclose(
        updates["down"]["kernel"], centralized(GRADS["down"]["kernel"], (0, 1)), atol=1e-6
    )


def test_a_part_may_have_a_fan_in_of_one() -> None:
    params = {"kernel": np.zeros((1, 4))}
    with pytest.raises(ValueError, match="nothing to centralize"):
        gcx.optax.centralize("flax").init(params)
    gcx.optax.centralize("flax", axis_name="x").init(params)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_name_that_is_not_bound(run: Any) -> None:
    optimizer = gcx.optax.centralize("flax", axis_name="x")
    update = run(partial(optimizer.update, state=optax.EmptyState()))
    with pytest.raises(ValueError, match=r"down/kernel: axis_name \('x',\) is not bound here.*jit"):
        update(GRADS)


def test_a_key_that_matches_no_parameter() -> None:
    optimizer = gcx.optax.centralize("flax", axis_name={"donw/kernel": "x"})
    message = "axis_name: 'donw/kernel' matches no parameter; there are: down/kernel, up/kernel"
    with pytest.raises(ValueError, match=message):
        optimizer.init(GRADS)
    with pytest.raises(ValueError, match=message):
        optimizer.update(GRADS, optax.EmptyState())


@pytest.mark.parametrize(
    "axis_name", [3, ("x", None), P("x"), {"*": P("x", None)}, {"*": 0}, ["x"], {1: "x"}]
)
def test_what_is_no_axis_name(axis_name: Any) -> None:
    with pytest.raises(TypeError, match=r"axis_name"):
        gcx.optax.centralize("flax", axis_name=axis_name).init(GRADS)
