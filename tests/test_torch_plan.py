"""Plans of models in torch: tied, parametrized and unknown weights, and rules of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

import gcx.torch
from gcx import Layout
from gcx.plan import LeaveAlone
from gcx.testing import assert_centralized

from torch_fan_in import declared_layout


def _decision(model: nn.Module, name: str) -> Layout | str:
    """Layout of a parameter, or the reason to leave it alone."""
    row = gcx.torch.plan(model)[name]
    assert row.shape == dict(model.named_parameters(remove_duplicate=False))[name].shape
    return row.layout or row.reason


class Codes(nn.Module):
    """Parameters in containers, and a child whose weight is used the other way around."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.ParameterList([torch.zeros(3, 4), torch.zeros(3)])
        self.nested = nn.ParameterDict({"a": nn.ParameterList([torch.zeros(5, 4)])})
        self.backwards = nn.Linear(4, 3)


class _Mine(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def _declared(rule: Any, kind: Any, *arguments: Any) -> Any:
    """Make a layer of a subclass that has a rule."""
    kind = type("Declared", (kind,), {})
    gcx.torch.register_layer(kind)(rule)
    return kind(*arguments)


def _parametrization(name: str, forward: Any, right_inverse: Any = None) -> nn.Module:
    methods = {"forward": forward, "right_inverse": right_inverse}
    kind = type(name, (nn.Module,), {name: by for name, by in methods.items() if by})
    return kind()


FLAT = _parametrization("_Flat", lambda _, w: w.reshape(3, 4), lambda _, w: w.flatten())
PRODUCT = _parametrization("_Product", lambda _, a, b: a @ b, lambda _, w: (torch.eye(len(w)), w))
TRANSPOSE = _parametrization("_Transposed", lambda _, w: w.T, lambda _, w: w.T)
UNIT = _parametrization("_Length", lambda _, w: w / w.norm(dim=1, keepdim=True))


def _linear(**attributes: nn.Module | Tensor) -> nn.Module:
    """A dense layer, with a parametrization or a frozen tensor in place of its weight."""
    layer = nn.Linear(4, 3)
    for name, value in attributes.items():
        if isinstance(value, nn.Module):
            register_parametrization(layer, name, value)
        else:
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
    return layer


def _tied(first: nn.Module, *others: nn.Module) -> nn.Module:
    for other in others:
        other.weight = first.weight
    return nn.ModuleList([first, *others])


def _pruned() -> nn.Module:
    layer = prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5)
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)  # a container of both
    return prune.random_unstructured(layer, "bias", 0.3)


def _norm(layer: nn.Module) -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(layer))


def _codebook() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.codebook = layer.weight
    return layer


BY_ROWS = Layout("o...")
LENGTH = "weight_norm g: the length of a weight"
EMBEDDING = "embedding: a row is an input, not an output unit"
FAN_IN_ONE = "fan-in 1: subtracting its mean would freeze it"
TIED = "tied, and the rules differ: "
UNKNOWN = "unknown: nobody declared "
BY_UNKNOWN = "unknown: a parametrization by "
MINE = f"{UNKNOWN}Parametrized_Mine.weight"
FLOAT8 = torch.zeros(3, 4).to(torch.float8_e4m3fn)
ORIGINAL = "parametrizations.weight.original"


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("make", "decisions"),
    [
        (
            lambda: _tied(nn.Linear(4, 4), nn.Embedding(4, 4), nn.Embedding(4, 4)),
            {"0.weight": f"{TIED}Linear; 1.weight: {EMBEDDING}"},
        ),
        (lambda: nn.EmbeddingBag(7, 4), {"weight": EMBEDDING}),
        (lambda: nn.Linear(5, 1), {"weight": BY_ROWS}),
        (lambda: nn.Conv2d(4, 4, 1, groups=4), {"weight": FAN_IN_ONE}),
        (_codebook, {"weight": f"{TIED}Linear; codebook: {UNKNOWN}Linear.codebook"}),
        (lambda: _tied(nn.Linear(4, 4), nn.Linear(4, 4)), {"0.weight": BY_ROWS}),
        (
            lambda: _tied(nn.Linear(4, 4), _declared({"weight": "oi"}, nn.Linear, 4, 4)),
            {"0.weight": BY_ROWS},
        ),
        (Codes, {"codes.0": f"{UNKNOWN}Codes.codes.0", "codes.1": "a vector has no fan-in"}),
        (Codes, {"nested.a.0": f"{UNKNOWN}Codes.nested.a.0"}),
        (lambda: Codes().codes, {"0": f"{UNKNOWN}ParameterList.0"}),
        (lambda: _linear(tau=torch.zeros(())), {"tau": "a scalar has no fan-in"}),
        (lambda: _linear(tau=torch.zeros(1)), {"tau": "a vector has no fan-in"}),
        (lambda: _linear(weight=torch.zeros(8, 1, 1).byte()), {"weight": "dtype uint8"}),
        (lambda: _linear(weight=FLOAT8), {"weight": "dtype float8_e4m3fn"}),
        (lambda: _linear(weight=torch.zeros(3, 4)), {"weight": BY_ROWS}),  # frozen
        (lambda: _norm(nn.Conv2d(3, 4, 3)), {f"0.{ORIGINAL}0": LENGTH, f"0.{ORIGINAL}1": BY_ROWS}),
        (lambda: _norm(_Mine(3, 4))[0], {f"{ORIGINAL}0": LENGTH, f"{ORIGINAL}1": MINE}),
        (
            lambda: nn.Sequential(nn.utils.weight_norm(nn.ConvTranspose1d(4, 6, 3, groups=2))),
            {"0.weight_g": LENGTH, "0.weight_v": Layout("(bi)o...", b=2)},
        ),
        (
            lambda: nn.utils.weight_norm(
                nn.MultiheadAttention(4, 2, add_bias_kv=True), "in_proj_weight"
            ),
            {"in_proj_weight_v": BY_ROWS, "bias_v": "token: appended to the keys and values"},
        ),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), {ORIGINAL: BY_ROWS}),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), {"weight_orig": BY_ROWS}),
        (_pruned, {"weight_orig": BY_ROWS, "bias_orig": "bias"}),
        (lambda: _linear(weight=FLAT), {ORIGINAL: f"{BY_UNKNOWN}_Flat"}),
        (lambda: _linear(weight=TRANSPOSE), {ORIGINAL: f"{BY_UNKNOWN}_Transposed"}),
        (
            lambda: _linear(weight=PRODUCT),
            dict.fromkeys((f"{ORIGINAL}0", f"{ORIGINAL}1"), f"{BY_UNKNOWN}_Product"),
        ),
        (lambda: _linear(weight=UNIT), {ORIGINAL: BY_ROWS}),
        (
            lambda: _linear(weight=parametrizations.weight_norm(nn.Linear(4, 4))),
            {f"parametrizations.weight.0.{ORIGINAL}1": BY_ROWS},
        ),
        (lambda: _linear(weight=UNIT).to("meta"), {ORIGINAL: f"{BY_UNKNOWN}_Length"}),
        (
            lambda: register_parametrization(nn.Linear(4, 4), "weight", TRANSPOSE),
            {ORIGINAL: f"{BY_UNKNOWN}_Transposed", "bias": "bias"},
        ),
        (
            lambda: register_parametrization(_norm(nn.Linear(3, 3))[0], "weight", TRANSPOSE),
            {f"{ORIGINAL}1": f"{BY_UNKNOWN}_WeightNorm, _Transposed"},
        ),
    ],
)
def test_decisions(make: Callable[[], nn.Module], decisions: dict[str, Layout | str]) -> None:
    model = make()
    assert {name: _decision(model, name) for name in decisions} == decisions


def test_rule_of_a_subclass_needs_to_say_only_what_is_new() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.scales = nn.Parameter(torch.ones(2, 2))

    for last in ("unknown: nobody declared Scaled.scales", "scales"):
        assert [row.reason for row in gcx.torch.plan(Scaled())] == ["Linear", "bias", last]
        gcx.torch.register_layer(Scaled)(lambda _: {"scales": LeaveAlone("scales")})


def test_rule_of_a_module_can_answer_for_its_children() -> None:
    rule = {"codes.*": LeaveAlone("codes"), "nested.*.*": "oi", "backwards.weight": "io"}
    plan = gcx.torch.plan(nn.Sequential(_declared(rule, Codes)))
    found = {row.name.removeprefix("0."): str(row.layout or row.reason) for row in plan}
    said = {"codes.0": "codes", "codes.1": "codes", "nested.a.0": "oi", "backwards.weight": "io"}
    assert found == {**said, "backwards.bias": "bias"}  # of which the rule says nothing
    # A glob does not reach the children.
    assert _decision(_declared({"*": None}, Codes), "backwards.weight") == BY_ROWS


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_coordinates_of_an_orthogonal_weight_have_no_fan_in(orthogonal_map: str) -> None:
    layer = parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map=orthogonal_map)
    original = layer.parametrizations.weight.original
    (grad,) = torch.autograd.grad(layer.weight[0].sum(), original)
    assert (grad == 0).sum() >= 6  # half of it is not used at all
    assert _decision(layer, ORIGINAL) == "orthogonal: coordinates of a rotation"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_layers_of_torch_jit_are_unknown(where: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 3)))
    assert str(_decision(model, "1.weight")).startswith(UNKNOWN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, model, where=where)
    start = model[0].weight.detach().clone()
    model(torch.rand(5, 4)).square().sum().backward()
    optimizer.step()
    assert_centralized(model[0].weight, start=start)


def test_models_without_shapes_are_an_error() -> None:
    of_keras: Any = type("Dense", (), {"__module__": "keras.src.layers"})()
    flat = _Mine(15)
    flat.weight._is_flat_param = True
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(12))
    lazy = nn.Sequential(nn.LazyLinear(3))

    class Batched(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.weight = nn.Parameter(torch.zeros(2, 3, 4))

    for model, error, message in (
        ([layer], TypeError, r"a torch\.nn\.Module, not list$"),
        (of_keras, TypeError, r"Module, not keras\.src\.layers\.Dense; .* use gcx\.keras"),
        (layer, RuntimeError, r"weight is of rank 1, where.*Linear.*fully_shard"),
        (flat, RuntimeError, r"weight is a flat buffer.*fully_shard"),
        (lazy, RuntimeError, r"0\.weight has no shape yet.*one forward pass"),
        (Batched(), RuntimeError, r"weight is of rank 3.*Batched.*register_layer"),
    ):
        with pytest.raises(error, match=message):
            gcx.torch.plan(model)
    lazy(torch.zeros(2, 5))
    assert str(gcx.torch.plan(lazy)[0].layout) == "o..."
    assert gcx.torch.plan(Batched(), overrides={"weight": "ooi"})[0].layout == Layout("ooi")


def test_layout_of_a_rule_is_checked() -> None:
    model = _declared(lambda layer: {"weight": layer.answer}, _Mine, 2, 3)
    for model.answer, error, message in (
        (Layout("(bi)...", b=3), RuntimeError, r"where a Declared has Layout\('\(bi\)\.\.\.', b=3"),
        ("out", ValueError, r"the rule of Declared answers 'out' for 'weight': layout"),
        (1, TypeError, r"the rule of Declared answers 1 for 'weight': a layout is"),
    ):
        with pytest.raises(error, match=message):
            gcx.torch.plan(model)
    model.answer = "oi"
    assert declared_layout(model, "weight") == Layout("oi")
    with pytest.raises(ValueError, match="the rule of Declared speaks of 'wieght', which this De"):
        gcx.torch.plan(_declared({"wieght": "io"}, _Mine, 2, 3))


def test_rule_may_speak_of_what_is_optional() -> None:
    class Optional(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3, bias=False)
            self.scale = None
            self.add_module("0", nn.Linear(4, 3))

    names = {"bias": None, "scale": None, "offset*": None, "0.weight": "io", "weight": "oi"}
    layers = [_declared(names, Optional) for _ in range(2)]
    for layer in (layers[0], parametrizations.spectral_norm(layers[1])):
        assert {str(row.layout) for row in gcx.torch.plan(layer) if row.layout} == {"oi", "io"}
