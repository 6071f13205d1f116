"""gcx.optax and layers: what needs no framework of layers."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import gcx.optax
from gcx import Layout
from gcx._decisions import merge
from gcx.optax._models._parameters import SingleLayer, decide_in_stack, trace_shapes
from gcx.optax._models.flax import einsum_layout
from gcx.plan import LeaveAlone, PlanRow

pytestmark = pytest.mark.one_framework

# Layout and shape of one layer, shape of what the optimizer has, layout of that.
STACKS: list[tuple[str, tuple[int, ...], tuple[int, ...], str | None]] = [
    ("io", (5, 4), (5, 4), "io"),
    ("io", (5, 4), (3, 5, 4), "bio"),
    ("io", (5, 4), (3, 2, 5, 4), "bbio"),
    ("io", (5, 4), (5, 3, 4), "ibo"),  # scanned over axis 1
    ("io", (5, 4), (5, 4, 3), "iob"),
    ("io", (5, 4), (5, 3, 2, 4), "ibbo"),
    ("io", (5, 5), (5, 5, 5), "bio"),  # all axes fit: it is the one in front
    ("...o", (3, 3, 2, 4), (7, 3, 3, 2, 4), "biiio"),
    ("...oi", (3, 4, 2), (3, 7, 4, 2), "iboi"),
    ("o...", (4, 2, 3), (7, 4, 2, 3), "boii"),
    ("bio", (2, 5, 4), (3, 2, 5, 4), "bbio"),  # a batch of kernels, scanned
    ("io", (5, 4), (4, 5), None),
    ("io", (5, 4), (20,), None),
    ("io", (5, 4), (3, 4, 5), None),
]


@pytest.mark.parametrize(("layout", "own", "shape", "expected"), STACKS)
def test_axes_of_a_stack_are_kept_wherever_they_are(
    layout: str, own: tuple[int, ...], shape: tuple[int, ...], expected: str | None
) -> None:
    unknown = PlanRow("w", shape, None, f"unknown: the shape is {shape}, but a Dense has {own}")
    row = unknown if expected is None else PlanRow("w", shape, Layout(expected), "Dense")
    assert decide_in_stack("w", shape, layout, "Dense", own) == row
    assert decide_in_stack("w", shape, SingleLayer(layout, own), "Dense") == row


@pytest.mark.parametrize(
    ("answer", "shape", "layout", "reason"),
    [
        ("io", (2, 2), "io", "Mine"),
        ("io", (2, 2, 2, 2), "bbio", "Mine"),  # more axes than it names: those of a stack
        ("...o", (2, 2, 2, 2), "...o", "Mine"),
        (Layout("(bi)o", b=2), (4, 6), Layout("(bi)o", b=2), "Mine"),
        (LeaveAlone("token"), (2, 3), None, "token"),
        (None, (2, 3), None, "left alone by the rule of Mine"),
    ],
)
def test_what_a_rule_may_answer(answer: Any, shape: Any, layout: Any, reason: str) -> None:
    expected = Layout(layout) if isinstance(layout, str) else layout
    assert decide_in_stack("w", shape, answer, "Mine") == PlanRow("w", shape, expected, reason)


def test_a_layout_of_more_axes_is_an_error_that_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"^a/w: layout 'ioo' is for arrays of rank 3, not 2"):
        decide_in_stack("a/w", (2, 2), "ioo", "Mine")


UNKNOWN = LeaveAlone("unknown: nobody declared Mine.gain")


@pytest.mark.parametrize(
    ("shape", "own", "reason"),
    [
        ((4,), None, "a vector has no fan-in"),
        ((3, 4), (4,), "a vector has no fan-in"),  # in a stack
        ((3,), (), "a scalar has no fan-in"),
        ((3, 4), None, UNKNOWN.reason),
    ],
)
def test_vectors_that_nobody_declared(shape: Any, own: Any, reason: str) -> None:
    assert decide_in_stack("gain", shape, UNKNOWN, "Mine", own).reason == reason


def test_tied_parameters() -> None:
    dense = decide_in_stack("w", (3, 2), "io", "Dense")
    other = decide_in_stack("w", (3, 2), "io", "Mine")
    table = decide_in_stack("w", (3, 2), LeaveAlone("embedding"), "Embed")
    assert merge([dense, other]) == dense
    tied = "tied, and the rules differ: Dense; embedding"
    assert merge([dense, table]) == PlanRow("w", (3, 2), None, tied)


EINSUMS = {
    "bi,io->bo": "io",
    "b i, i o -> b o": "io",
    "bei,eio->beo": "bio",
    "...d,dhk->...hk": "ioo",
    "bhk,hkd->bd": "iio",
    "bd,d->bd": LeaveAlone("no fan-in: nothing is summed over"),
    "...d,d...->...": LeaveAlone("unknown: an ellipsis in the kernel of an einsum"),
    None: LeaveAlone("unknown: the einsum string came with the call"),
}


@pytest.mark.parametrize(("subscripts", "expected"), EINSUMS.items())
def test_fan_in_of_an_einsum_is_what_it_sums_over(subscripts: Any, expected: Any) -> None:
    assert einsum_layout(subscripts) == expected


def test_tracing_takes_shapes_and_leaves_options_alone() -> None:
    def model(x: Any, scale: float, *, train: bool, more: Any) -> Any:
        assert isinstance(x, jax.core.Tracer)
        assert isinstance(more["y"], jax.core.Tracer)
        return x * scale @ more["y"] if train else x

    def shape(train: bool) -> Any:
        struct = jax.ShapeDtypeStruct((2, 3), "float32")
        options = {"train": train, "more": {"y": jnp.ones((3, 4))}}
        return trace_shapes(model, (struct, 2.0), options).shape

    assert shape(train=True) == (2, 4)
    assert shape(train=False) == (2, 3)


# --- mappings with reasons ------------------------------------------------------------------------


def test_a_mapping_may_say_why() -> None:
    params = {name: jnp.zeros((2, 3)) for name in "abcd"} | {"table": jnp.zeros((5, 3))}
    given = {
        "a": Layout("io"),
        "[bt]*": LeaveAlone("a table"),
        "c": None,
        "d": "oi",
        "table": "io",  # too late: the first key that matches counts
    }
    expected = """\
parameter  shape  layout  reason
a          2x3    io      as given
b          2x3    -       a table
c          2x3    -       as given
d          2x3    oi      as given
table      5x3    -       a table
2 of 5 parameters centralized"""
    assert str(gcx.optax.plan(params, given)) == expected


def test_a_function_may_say_why() -> None:
    (row,) = gcx.optax.plan([jnp.zeros((2, 3))], lambda name, array: LeaveAlone(f"token {name}"))
    assert (row.layout, row.reason) == (None, "token 0")


def test_only_reasons_are_nothing_to_centralize() -> None:
    optimizer = gcx.optax.centralize({"a": LeaveAlone("token")})
    with pytest.raises(ValueError, match=r"nothing to centralize in (?s:.*)\na .* token"):
        optimizer.init({"a": jnp.zeros((2, 3))})


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["flax", {}, None, 3, jnp.ones])
def test_layouts_of_what_is_no_model(model: Any) -> None:
    message = (
        "model is an nnx, linen or Equinox module, or the result of haiku.transform, not "
        f"{type(model).__name__}"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        gcx.optax.layouts(model)


def test_register_layer_takes_a_class() -> None:
    with pytest.raises(TypeError, match="register_layer takes the class of a layer, not 'Experts'"):
        gcx.optax.register_layer("Experts")  # type: ignore[arg-type]
