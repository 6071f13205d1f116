"""Answers of the user: every kind of key and of value, and what comes before what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import gcx.torch
from gcx import Layout
from gcx.plan import LeaveAlone


def new_model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.LayerNorm((2, 3)), nn.Linear(3, 2))


def plan(model: nn.Module, overrides: Any, **options: Any) -> dict[str, tuple[str | None, str]]:
    """Layout and reason of each parameter."""
    rows = gcx.torch.plan(model, overrides=overrides, **options)
    return {row.name: (row.layout and str(row.layout), row.reason) for row in rows}


AS_GIVEN = (None, "left alone by an override")


KEYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "name": (lambda model: "1.weight", "1.weight"),
    "glob": (lambda model: "1.w*", "1.weight"),
    "set": (lambda model: "[01].weight", "0.weight 1.weight"),
    "parameter": (lambda model: model[1].weight, "1.weight"),
    "module": (lambda model: model[1], "1.weight 1.bias"),
    "model": (lambda model: model, " ".join(dict(new_model().named_parameters()))),
}


@pytest.mark.parametrize("key", KEYS)
def test_keys(key: str) -> None:
    make_key, covered = KEYS[key]
    model = new_model()
    without = plan(model, None)
    expected = {name: AS_GIVEN if name in covered.split() else row for name, row in without.items()}
    assert plan(model, {make_key(model): None}) == expected


MODEL, LAYER = new_model(), nn.Linear(4, 3, bias=False)
# The name with brackets matches the other as a glob.
TENSORS = nn.ParameterDict({"w[0]": torch.zeros(3, 2), "w0": torch.zeros(3, 2)})
IO, BIAS, SOON = ("io", "override"), (None, "bias"), LeaveAlone("frozen soon")
GROUPS = Layout("(bi)o...", b=3)
TIED = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
TIED["head"].weight = TIED["embedding"].weight
TRANSPOSE = type("", (nn.Module,), dict.fromkeys(("forward", "right_inverse"), lambda _, w: w.T))
TRANSPOSED = nn.utils.parametrize.register_parametrization(
    nn.Linear(4, 3, bias=False), "weight", TRANSPOSE()
)
ORIGINAL = "parametrizations.weight.original"


@pytest.mark.parametrize(
    ("model", "overrides", "rows"),
    [
        (TENSORS, {"w[0]": "io"}, {"w0": IO, "w[0]": IO}),
        (LAYER, {LAYER: None}, {"weight": AS_GIVEN}),
        (nn.ModuleDict({"a": LAYER, "b": LAYER}), {"b.weight": "io"}, {"a.weight": IO}),
        (MODEL, {"1.weight": "io"}, {"1.weight": IO, "3.weight": ("o...", "Linear")}),
        (MODEL, {"[02].weight": Layout("io")}, {"0.weight": IO, "2.weight": IO}),
        (MODEL, {MODEL[1]: SOON}, dict.fromkeys(("1.weight", "1.bias"), (None, "frozen soon"))),
        # Which is not for its vectors.
        (MODEL, {MODEL[1]: "io"}, {"1.weight": IO, "1.bias": BIAS}),
        (MODEL, {"1.bias": "i"}, {"1.bias": ("i", "override")}),
        # The first key counts.
        (
            MODEL,
            {"3.weight": "io", "*.weight": None, MODEL[3]: "oi"},
            {"3.weight": IO, "1.weight": AS_GIVEN},
        ),
        (MODEL, {"*.weight": None, "3.weight": "io"}, {"3.weight": AS_GIVEN}),
        (
            nn.Linear(1, 3, bias=False),
            {"weight": "oi"},
            {"weight": (None, "fan-in 1: subtracting its mean would freeze it")},
        ),
        (nn.Conv1d(4, 6, 3), {"weight": GROUPS}, {"weight": (str(GROUPS), "override, 3 groups")}),
        # Weights that are tied, or made of others, about which the layers say something else.
        (TIED, {"embedding.weight": "io"}, {"embedding.weight": IO}),
        (TIED, {"head.weight": "io"}, {"embedding.weight": IO}),
        (TIED, {TIED["head"]: None}, {"embedding.weight": AS_GIVEN}),
        (TRANSPOSED, {ORIGINAL: "io"}, {ORIGINAL: IO}),
        (TRANSPOSED, {TRANSPOSED: None}, {ORIGINAL: AS_GIVEN}),
        (
            parametrizations.weight_norm(nn.Linear(4, 3)),
            {"*.original1": None},
            {
                f"{ORIGINAL}0": (None, "weight_norm g: the length of a weight"),
                f"{ORIGINAL}1": AS_GIVEN,
            },
        ),
        (prune.identity(nn.Linear(4, 3), "weight"), {"weight_orig": "io"}, {"weight_orig": IO}),
    ],
)
def test_answers(model: nn.Module, overrides: Any, rows: dict[str, Any]) -> None:
    found = plan(model, overrides)
    assert {**found, **rows} == found


def test_override_comes_before_layers() -> None:
    found = plan(MODEL, {"1.weight": "io"}, layers="conv")
    assert found["1.weight"] == IO
    assert found["3.weight"] == (None, "not a convolution, and layers='conv'")


STRANGER = nn.Parameter(torch.zeros(3, 4))
NO_KEY = "a key is the name of a parameter, a glob, a parameter or"
NO_VALUE = r"^overrides: 1\.weight: a layout is a string such as 'o...' or a gcx\.Layout, not "


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"1.w": None}, ValueError, r"'1\.w' matches no parameter; there are: 0\.weight, 1"),
        ({"*.wieght": None}, ValueError, r"'\*\.wieght' matches no parameter"),
        ({STRANGER: None}, ValueError, r"tensor of shape \(3, 4\) is no parameter"),
        ({nn.Linear(4, 3): None}, ValueError, "this Linear holds no parameter of the model$"),
        ({nn.ReLU(): None}, ValueError, "this ReLU holds no parameter of the model$"),
        *[
            (key, TypeError, "overrides is a mapping from names to layouts, not ")
            for key in ([], ["1.weight"], 0, 3, "1.weight")
        ],
        *[({key: None}, TypeError, NO_KEY) for key in (nn.Linear, 1, None, ("1.weight",))],
        *[({"1.weight": v}, TypeError, NO_VALUE) for v in (True, 1, {"0": "oi"}, [0], (None,))],
        ({"1.weight": "oio"}, ValueError, r"1.weight of shape .* does not fit Layout\('oio'\)"),
        ({"1.bias": "o..."}, ValueError, r"1.bias of shape .* does not fit Layout\('o...'\)"),
        ({"1.weight": "out"}, ValueError, "layout 'out' is not valid"),
    ],
)
def test_errors(overrides: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gcx.torch.plan(MODEL, overrides=overrides)


def test_errors_of_other_models() -> None:
    for given in (Layout("(bi)o...", b=4), Layout("oi")):
        with pytest.raises(ValueError, match=r"weight of shape \(6, 4, 3\) does not fit Layout\('"):
            gcx.torch.plan(nn.Conv1d(4, 6, 3), overrides={"weight": given})
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"this LayerNorm holds no .* with two axes or"):
        gcx.torch.plan(model, overrides={model[1]: "oi"})
    with pytest.raises(ValueError, match=r"'\*' matches no parameter; there are: \(none\)"):
        gcx.torch.plan(nn.ReLU(), overrides={"*": None})
    with pytest.raises(RuntimeError, match="has no shape yet"):
        gcx.torch.plan(nn.LazyLinear(3), overrides={"weight": "io"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_weight_without_gradient(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 4).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"weight is of dtype {dtype}, which has no gradient"):
        gcx.torch.plan(layer, overrides={"weight": "oi"})
    assert plan(layer, {"weight": None})["weight"][0] is None
