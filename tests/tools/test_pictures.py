"""The pictures of the documentation show what gcx does, and come from docs/draw.py."""

from __future__ import annotations

import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gcx.plan import Plan

DOCS = Path(__file__).parents[2] / "docs"
DRAWING = runpy.run_path(str(DOCS / "draw.py"))
PICTURES: dict[str, str] = DRAWING["draw_all"]()


def test_no_picture_is_missing() -> None:
    assert {path.stem for path in (DOCS / "_static").glob("*.svg")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_as_drawn(name: str) -> None:
    committed = (DOCS / "_static" / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == PICTURES[name], "python docs/draw.py writes it anew"
    assert len(committed) < 60_000


def torch_plan() -> Plan:
    from torch import nn

    import gcx.torch

    transposed = nn.ConvTranspose2d(2, 3, 2), nn.ConvTranspose2d(4, 4, 2, groups=2)
    return gcx.torch.plan(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 2), *transposed))


def flax_plan() -> Plan:
    from flax import nnx

    import gcx.optax

    rngs = nnx.Rngs(0)
    layers = [make(2, 3, (2, 2), rngs=rngs) for make in (nnx.Conv, nnx.ConvTranspose)]
    layers += [nnx.Linear(4, 3, rngs=rngs), nnx.MultiHeadAttention(2, 4, rngs=rngs).query]
    return gcx.optax.plan(nnx.Dict({f"layer{k}": layer for k, layer in enumerate(layers)}))


def keras_plan() -> Plan:
    from keras import Input, Model, layers

    import gcx.keras

    images = Input((8, 8, 2))
    deep = layers.Dense(3)(layers.DepthwiseConv2D(2, depth_multiplier=2)(images))
    wide = [layer(3, 2)(images) for layer in (layers.Conv2D, layers.Conv2DTranspose)]
    return gcx.keras.plan(Model(images, [deep, *wide]))


@pytest.mark.parametrize("plan", [torch_plan, flax_plan, keras_plan])
def test_kernels_are_those_of_the_framework(plan: Callable[[], Plan]) -> None:
    drawn = DRAWING["KERNELS"][plan.__name__.removesuffix("_plan")]
    rows = [row for row in plan() if row.layout is not None]
    found = Counter((row.shape, row.layout.split(row.shape)) for row in rows)
    assert found == Counter((shape, layout.split(shape)) for _, _, shape, layout in drawn)
