"""What the layers of torch declare, checked against autograd and read back from the plan."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

import gcx.torch
from gcx import Layout
from gcx._rules import Rule
from gcx.plan import LeaveAlone
from gcx.testing import assert_centralized
from gcx.torch._layers import (
    _RULES,
    CONVOLUTIONS,
    TORCH_NN,
    TRANSPOSED,
    answer,
)

from torch_fan_in import assert_fan_in_is_support, channels, declared_layout, features

pytestmark = [
    pytest.mark.one_framework,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def _channels_of(layer: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    return layer, channels(layer(torch.randn(shape)))


def _features_of(layer: nn.Module, *shapes: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    output = layer(*[torch.randn(shape) for shape in shapes])
    return layer, features(output[0] if isinstance(output, tuple) else output)


def _cell_state_of(layer: nn.LSTM, *shape: int) -> tuple[nn.Module, Tensor]:
    """The new cell state, which depends on three of four gates, from one that is not zero."""
    _, (_, cell) = layer(torch.randn(shape), (torch.randn(1, 2, 4), torch.randn(1, 2, 4)))
    return layer, features(cell)


def _lstm_cell() -> tuple[nn.Module, Tensor]:
    layer = nn.LSTMCell(3, 4)
    hidden, _ = layer(torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4)))
    return layer, features(hidden)


def _heads_of(**options: int) -> tuple[nn.Module, Tensor]:
    """Attention with heads of size 1 and no mixing after it: an output for each head."""
    width = 4
    layer = nn.MultiheadAttention(width, num_heads=width, add_bias_kv=True, **options)
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(width))
    size = {"key": options.get("kdim", width), "value": options.get("vdim", width)}
    query = torch.randn(3, width)
    key, value = torch.randn(5, size["key"]), torch.randn(5, size["value"])
    return layer, features(layer(query, key, value)[0])


# How to make a layer and one number for each output, the name of a weight, and how many output
# units of that weight enter into one output: more than one where gates or projections are stacked.
LAYERS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], str, int]] = {
    "linear": (lambda: _features_of(nn.Linear(5, 3), (4, 5)), "weight", 1),
    "bilinear": (lambda: _features_of(nn.Bilinear(3, 4, 2), (6, 3), (6, 4)), "weight", 1),
    "conv1d": (lambda: _channels_of(nn.Conv1d(4, 3, 3), 2, 4, 8), "weight", 1),
    "conv2d": (lambda: _channels_of(nn.Conv2d(4, 3, (3, 2)), 2, 4, 7, 7), "weight", 1),
    "conv3d": (lambda: _channels_of(nn.Conv3d(2, 3, 2), 2, 2, 5, 5, 5), "weight", 1),
    "grouped": (lambda: _channels_of(nn.Conv2d(4, 6, 3, groups=2), 2, 4, 7, 7), "weight", 1),
    "depthwise": (lambda: _channels_of(nn.Conv2d(4, 8, 3, groups=4), 2, 4, 7, 7), "weight", 1),
    "transposed1d": (lambda: _channels_of(nn.ConvTranspose1d(4, 3, 3), 2, 4, 8), "weight", 1),
    "transposed2d": (lambda: _channels_of(nn.ConvTranspose2d(4, 3, 3), 2, 4, 5, 5), "weight", 1),
    "transposed3d": (lambda: _channels_of(nn.ConvTranspose3d(2, 3, 2), 1, 2, 4, 4, 4), "weight", 1),
    "grouped-transposed1d": (
        lambda: _channels_of(nn.ConvTranspose1d(6, 4, 3, groups=2), 2, 6, 8),
        "weight",
        1,
    ),
    "grouped-transposed2d": (
        lambda: _channels_of(nn.ConvTranspose2d(6, 9, 2, groups=3, stride=2), 2, 6, 5, 5),
        "weight",
        1,
    ),
    "depthwise-transposed3d": (
        lambda: _channels_of(nn.ConvTranspose3d(2, 4, 2, groups=2), 1, 2, 4, 4, 4),
        "weight",
        1,
    ),
    "attention": (_heads_of, "in_proj_weight", 3),
    "attention-query": (lambda: _heads_of(kdim=3, vdim=2), "q_proj_weight", 1),
    "attention-key": (lambda: _heads_of(kdim=3, vdim=2), "k_proj_weight", 1),
    "attention-value": (lambda: _heads_of(kdim=3, vdim=2), "v_proj_weight", 1),
    "rnn-input": (lambda: _features_of(nn.RNN(3, 4), (1, 2, 3)), "weight_ih_l0", 1),
    "rnn-cell-input": (lambda: _features_of(nn.RNNCell(3, 4), (2, 3)), "weight_ih", 1),
    "rnn-cell-hidden": (lambda: _features_of(nn.RNNCell(3, 4), (2, 3), (2, 4)), "weight_hh", 1),
    "gru-input": (lambda: _features_of(nn.GRU(3, 4), (1, 2, 3)), "weight_ih_l0", 3),
    "gru-cell-hidden": (lambda: _features_of(nn.GRUCell(3, 4), (2, 3), (2, 4)), "weight_hh", 3),
    "lstm-input": (lambda: _cell_state_of(nn.LSTM(3, 4), 1, 2, 3), "weight_ih_l0", 3),
    "lstm-hidden": (lambda: _cell_state_of(nn.LSTM(3, 4), 1, 2, 3), "weight_hh_l0", 3),
    "lstm-projection": (
        lambda: _features_of(nn.LSTM(3, 4, proj_size=2), (1, 2, 3)),
        "weight_hr_l0",
        1,
    ),
    "lstm-cell-input": (_lstm_cell, "weight_ih", 4),
    "lstm-cell-hidden": (_lstm_cell, "weight_hh", 4),
}


@pytest.mark.parametrize("case", LAYERS)
def test_declared_fan_in_is_what_autograd_sees(case: str) -> None:
    """An output depends on the elements of its own output units, on all of them and no others."""
    torch.manual_seed(0)
    make, name, units_per_output = LAYERS[case]
    assert_fan_in_is_support(*make(), name, units_per_output)


def test_every_layer_with_a_fan_in_is_checked() -> None:
    checked = {type(make()[0]) for make, _, _ in LAYERS.values()}
    with_fan_in = {kind for kind, rule in TORCH_NN.items() if _has_fan_in(rule)}
    assert checked == with_fan_in - {nn.RNNBase, nn.RNNCellBase}


def _has_fan_in(rule: Rule[Any]) -> bool:
    return callable(rule) or not all(isinstance(found, LeaveAlone) for found in rule.values())


def _registers_parameters(kind: type[nn.Module]) -> bool:
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    return any(re.search(r"\bParameter\(", inspect.getsource(base)) for base in bases)


def test_every_layer_of_torch_has_a_rule() -> None:
    """A release of torch with a new layer breaks this."""
    modules = {m for m in vars(nn).values() if inspect.isclass(m) and issubclass(m, nn.Module)}
    lazy = {m for m in modules if issubclass(m, LazyModuleMixin)}  # they become the others
    without = {m for m in modules if _registers_parameters(m) and not _RULES._rules_of(m)}
    # Of containers, the modules that hold them are asked.
    assert without - lazy == {nn.ParameterList, nn.ParameterDict}


ARGUMENTS: dict[type[nn.Module], tuple[object, ...]] = {
    nn.Bilinear: (3, 4, 2),
    nn.GroupNorm: (2, 4),
    nn.MultiheadAttention: (4, 2),
    nn.PReLU: (),
    nn.RNNBase: ("LSTM", 3, 4),
    nn.RNNCellBase: (3, 4, True, 4),
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), (4, 4, 2)),
    **dict.fromkeys((nn.Linear, nn.Embedding, nn.EmbeddingBag), (7, 4)),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell), (3, 4)),
}


@pytest.mark.parametrize("kind", TORCH_NN, ids=lambda kind: kind.__name__)
def test_every_parameter_of_torch_has_an_answer(kind: type[nn.Module]) -> None:
    layer = kind(*ARGUMENTS.get(kind, (4,)))
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    assert [name for name in names if answer(layer, name) is None] == []


class Zoo(nn.Module):
    """One of each: what is centralized, and what is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.norm = nn.LayerNorm((2, 4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.one = nn.Linear(1, 4)
        self.head = nn.Linear(4, 7)


def test_plan_of_a_model() -> None:
    model = Zoo()
    assert (
        str(gcx.torch.plan(model))
        == """\
parameter                  shape    layout    reason
cls_token                  1x1x4    -         unknown: nobody declared Zoo.cls_token
embed.weight               7x4      -         embedding: a row is an input, not an output unit
conv.weight                4x3x3x3  o...      Conv2d
up.weight                  4x3x2x2  (bi)o...  ConvTranspose2d, 2 groups
up.bias                    6        -         bias
norm.weight                2x4      -         norm
norm.bias                  2x4      -         bias
attention.in_proj_weight   12x4     o...      MultiheadAttention
attention.in_proj_bias     12       -         bias
attention.bias_k           1x1x4    -         token: appended to the keys and values
attention.bias_v           1x1x4    -         token: appended to the keys and values
attention.out_proj.weight  4x4      o...      Linear
attention.out_proj.bias    4        -         bias
one.weight                 4x1      -         fan-in 1: subtracting its mean would freeze it
one.bias                   4        -         bias
head.weight                7x4      o...      Linear
head.bias                  7        -         bias
5 of 17 parameters centralized"""
    )
    names = [name for name, _ in model.named_parameters()]
    assert [row.name for row in gcx.torch.plan(model)] == names


def _reason(model: nn.Module, name: str) -> str:
    (row,) = [row for row in gcx.torch.plan(model) if row.name == name]
    assert row.layout is None
    return row.reason


def _is_centralized(model: nn.Module, name: str) -> bool:
    (row,) = [row for row in gcx.torch.plan(model) if row.name == name]
    return row.layout is not None


def test_embedding_tied_to_the_head_is_left_alone() -> None:
    model = Zoo()
    model.head.weight = model.embed.weight
    assert _reason(model, "embed.weight") == (
        "tied, and the rules differ: embedding: a row is an input, not an output unit; "
        "head.weight: Linear"
    )


def test_tied_parameter_of_three_owners_names_each_rule_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Embedding(4, 4), nn.Embedding(4, 4)])
    model[1].weight = model[2].weight = model[0].weight
    assert _reason(model, "0.weight") == (
        "tied, and the rules differ: Linear; "
        "1.weight: embedding: a row is an input, not an output unit"
    )


def test_parameter_of_two_names_in_one_layer_is_tied() -> None:
    layer = nn.Linear(4, 4)
    layer.codebook = layer.weight
    assert _reason(layer, "weight").endswith("codebook: unknown: nobody declared Linear.codebook")


def test_tied_parameter_of_one_rule_is_centralized() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    plan = gcx.torch.plan(model)
    assert [(row.name, str(row.layout)) for row in plan if row.layout] == [("0.weight", "o...")]


def test_tied_parameter_of_rules_that_mean_the_same_is_centralized() -> None:
    class Router(nn.Linear):
        pass

    gcx.torch.register_layer(Router)(lambda _: {"weight": "oi"})
    model = nn.Sequential(nn.Linear(4, 4), Router(4, 4))
    model[1].weight = model[0].weight
    assert _is_centralized(model, "0.weight")


def test_layer_in_two_places_is_listed_once() -> None:
    layer = nn.Linear(4, 3)
    plan = gcx.torch.plan(nn.ModuleDict({"encoder": layer, "decoder": layer}))
    assert [row.name for row in plan] == ["encoder.weight", "encoder.bias"]


def test_subclass_follows_the_rule_of_its_base() -> None:
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora_a = nn.Parameter(torch.zeros(2, 4))

    assert _is_centralized(LowRank(), "weight")
    assert _reason(LowRank(), "lora_a") == "unknown: nobody declared LowRank.lora_a"


def test_rule_of_a_subclass_needs_to_say_only_what_is_new() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.scales = nn.Parameter(torch.ones(2, 2))

    gcx.torch.register_layer(Scaled)(lambda _: {"scales": LeaveAlone("scales")})
    assert [row.reason for row in gcx.torch.plan(Scaled())] == ["Linear", "bias", "scales"]


class Codes(nn.Module):
    """Parameters in containers, and a child whose weight is used the other way around."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.ParameterList([torch.zeros(3, 4), torch.zeros(3)])
        self.nested = nn.ParameterDict({"a": nn.ParameterList([torch.zeros(5, 4)])})
        self.backwards = nn.Linear(4, 3)


def test_parameters_in_containers_are_those_of_the_module_that_holds_them() -> None:
    assert _reason(Codes(), "codes.0") == "unknown: nobody declared Codes.codes.0"
    assert _reason(Codes(), "codes.1") == "a vector has no fan-in"
    assert _reason(Codes(), "nested.a.0") == "unknown: nobody declared Codes.nested.a.0"
    alone = nn.ParameterList([torch.zeros(3, 4)])
    assert _reason(alone, "0") == "unknown: nobody declared ParameterList.0"


def test_rule_of_a_module_can_answer_for_its_children() -> None:
    class Declared(Codes):
        pass

    gcx.torch.register_layer(Declared)(
        lambda _: {"codes.*": LeaveAlone("codes"), "nested.*.*": "oi", "backwards.weight": "io"}
    )
    plan = {row.name: row for row in gcx.torch.plan(nn.Sequential(Declared()))}
    assert plan["0.codes.0"].reason == "codes"
    assert str(plan["0.nested.a.0"].layout) == "oi"
    assert str(plan["0.backwards.weight"].layout) == "io"
    assert plan["0.backwards.bias"].reason == "bias"  # of which the rule says nothing


def test_glob_for_the_parameters_of_a_layer_does_not_reach_its_children() -> None:
    class Greedy(Codes):
        pass

    gcx.torch.register_layer(Greedy)(lambda _: {"*": None})
    assert _is_centralized(Greedy(), "backwards.weight")


@pytest.mark.parametrize(("shape", "kind"), [((), "scalar"), ((1,), "vector"), ((7,), "vector")])
def test_vectors_of_unknown_layers_have_no_fan_in(shape: tuple[int, ...], kind: str) -> None:
    model = nn.Module()
    model.tau = nn.Parameter(torch.zeros(shape))
    assert _reason(model, "tau") == f"a {kind} has no fan-in"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_left_alone(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 4).to(dtype), requires_grad=False)
    assert _reason(layer, "weight") == str(dtype).replace("torch.", "dtype ")


def test_quantized_weights_may_have_any_shape() -> None:
    layer = nn.Linear(4, 2)
    layer.weight = nn.Parameter(torch.zeros(8, 1, 1, dtype=torch.uint8), requires_grad=False)
    assert _reason(layer, "weight") == "dtype uint8"


def test_frozen_parameter_keeps_its_layout() -> None:
    layer = nn.Linear(4, 2).requires_grad_(requires_grad=False)
    assert _is_centralized(layer, "weight")


@pytest.mark.parametrize("wrapped", [False, True])
def test_weight_norm(wrapped: bool) -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    model, prefix = (nn.Sequential(layer), "0.") if wrapped else (layer, "")
    name = prefix + "parametrizations.weight.original"
    assert _reason(model, name + "0") == "weight_norm g: the length of a weight"
    assert _is_centralized(model, name + "1")


def test_spectral_norm_divides_by_one_number() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    ratio = layer.weight / layer.parametrizations.weight.original
    torch.testing.assert_close(ratio, ratio[0, 0].expand(3, 4))
    assert _is_centralized(layer, "parametrizations.weight.original")


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("shape", [(4, 3), (3, 4)])
def test_coordinates_of_an_orthogonal_weight_have_no_fan_in(
    shape: tuple[int, int], orthogonal_map: str
) -> None:
    layer = parametrizations.orthogonal(nn.Linear(*shape), orthogonal_map=orthogonal_map)
    original = layer.parametrizations.weight.original
    (grad,) = torch.autograd.grad(layer.weight[0].sum(), original)
    assert (grad == 0).sum() >= 6  # half of it is not used at all
    name = "parametrizations.weight.original"
    assert _reason(layer, name) == "orthogonal: coordinates of a rotation"


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_by_hooks() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.ConvTranspose2d(4, 6, 3, groups=2), dim=1))
    assert _reason(model, "0.weight_g") == "weight_norm g: the length of a weight"
    assert declared_layout(model, "0.weight_v") == Layout("(bi)o...", b=2)


def test_spectral_norm_by_hooks() -> None:
    layer = nn.utils.spectral_norm(nn.Linear(4, 3))
    assert _is_centralized(layer, "weight_orig")


def test_pruned_weight_follows_its_owner() -> None:
    layer = prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5)
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)  # a container of both
    prune.random_unstructured(layer, "bias", 0.3)
    assert _is_centralized(layer, "weight_orig")
    assert _reason(layer, "bias_orig") == "bias"


def test_g_of_an_unknown_layer_is_still_a_length() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(3, 4))

    layer = parametrizations.weight_norm(Mine(), "matrix")
    name = "parametrizations.matrix.original"
    assert _reason(layer, name + "0") == "weight_norm g: the length of a weight"
    assert _reason(layer, name + "1") == "unknown: nobody declared ParametrizedMine.matrix"


class _Flat(nn.Module):
    def forward(self, original: Tensor) -> Tensor:
        return original.reshape(3, 4)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.flatten()


class _Product(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.eye(len(weight)), weight


class _Transposed(nn.Module):
    def forward(self, original: Tensor) -> Tensor:
        return original.T

    right_inverse = forward


@pytest.mark.parametrize("kind", [_Flat, _Transposed, _Product])
def test_unknown_parametrizations_are_left_alone(kind: type[nn.Module]) -> None:
    layer = nn.Linear(4, 3)
    register_parametrization(layer, "weight", kind())
    reasons = {row.reason for row in gcx.torch.plan(layer) if "original" in row.name}
    assert reasons == {f"unknown: nobody declared the parametrization by {kind.__name__}"}


def test_unknown_parametrization_of_a_known_one_is_left_alone() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    register_parametrization(layer, "weight", _Transposed())
    reason = "unknown: nobody declared the parametrization by _WeightNorm, _Transposed"
    assert _reason(layer, "parametrizations.weight.original1") == reason


def test_layout_of_a_grouped_transposed_convolution_splits_its_inputs() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    row = gcx.torch.plan(layer)[0]
    assert row.layout is not None
    assert row.layout.split(row.shape) == ((2, 2, 3, 3, 3), (1, 3, 4))
    grad = torch.randn_like(layer.weight)
    by_hand = gcx.centralize(grad, layout=row.layout)
    layer.weight.grad = grad
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, layer)
    optimizer.step()
    torch.testing.assert_close(layer.weight.grad, by_hand)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("where", ["gradient", "update"])
@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(4))]
)
def test_layers_of_torch_jit_are_unknown(
    compiled: Callable[[nn.Module], nn.Module], where: Literal["gradient", "update"]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), compiled(nn.Linear(4, 3)))
    assert _reason(model, "1.weight").startswith("unknown: nobody declared")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, model, where=where)
    start = [p.detach().clone() for p in model.parameters()]
    model(torch.rand(5, 4)).square().sum().backward()
    optimizer.step()
    assert_centralized(model[0].weight.detach() - start[0])
    assert not torch.equal(model[1].weight, start[2])


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)],
    ids=lambda m: type(m).__name__,
)
def test_weight_that_is_flattened_in_place_is_an_error_of_the_step(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, layer)
    layer.weight.data = layer.weight.data.flatten()[:10]  # as FSDP1 does it
    layer.weight.grad = torch.ones(10)
    with pytest.raises(
        RuntimeError, match=r"weight is of rank 1, .*centralize_in_backward\(model\)"
    ):
        optimizer.step()


def test_lazy_layer_must_have_run_once() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(RuntimeError, match=r"0\.weight has no shape yet.*one forward pass"):
        gcx.torch.plan(model)
    model(torch.zeros(2, 5))
    assert str(gcx.torch.plan(model)[0].layout) == "o..."


def test_flattened_weights_are_an_error() -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(12))
    with pytest.raises(RuntimeError, match=r"weight is of rank 1, where.*Linear.*fully_shard"):
        gcx.torch.plan(layer)
    flat = nn.Module()
    flat.buffer = nn.Parameter(torch.zeros(15))
    flat.buffer._is_flat_param = True
    with pytest.raises(RuntimeError, match=r"buffer is a flat buffer.*fully_shard"):
        gcx.torch.plan(flat)


def test_weight_of_another_rank_than_its_layer_has_is_an_error() -> None:
    class Batched(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.weight = nn.Parameter(torch.zeros(2, 3, 4))

    with pytest.raises(RuntimeError, match=r"weight is of rank 3.*Batched.*register_layer"):
        gcx.torch.plan(Batched())
    assert gcx.torch.plan(Batched(), overrides={"weight": "ooi"})[0].layout == Layout("ooi")


def test_layout_of_a_rule_is_checked() -> None:
    class Wrong(nn.Module):
        def __init__(self, answer: object) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3))
            self.answer = answer

    gcx.torch.register_layer(Wrong)(lambda layer: {"weight": layer.answer})
    assert declared_layout(Wrong("oi"), "weight") == Layout("oi")
    with pytest.raises(RuntimeError, match=r"where a Wrong has Layout\('\(bi\)\.\.\.', b=3\)"):
        gcx.torch.plan(Wrong(Layout("(bi)...", b=3)))
    with pytest.raises(ValueError, match=r"the rule of Wrong answers 'out' for 'weight': layout"):
        gcx.torch.plan(Wrong("out"))
    with pytest.raises(TypeError, match=r"the rule of Wrong answers 1 for 'weight': a layout is"):
        gcx.torch.plan(Wrong(1))


def test_rule_with_a_typo_is_an_error() -> None:
    class Typed(nn.Linear):
        pass

    gcx.torch.register_layer(Typed)(lambda _: {"wieght": "io"})
    with pytest.raises(ValueError, match="the rule of Typed speaks of 'wieght', which this Typed"):
        gcx.torch.plan(Typed(4, 3))


def test_rule_may_speak_of_what_is_optional() -> None:
    class Optional(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3, bias=False)
            self.scale = None
            self.add_module("0", nn.Linear(4, 3))

    gcx.torch.register_layer(Optional)(
        lambda _: {"bias": None, "scale": None, "offset*": None, "0.weight": "io", "weight": "oi"}
    )
    for layer in (Optional(), parametrizations.spectral_norm(Optional())):
        assert {str(row.layout) for row in gcx.torch.plan(layer) if row.layout} == {"oi", "io"}


def test_plan_is_of_a_module() -> None:
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module, not a list"):
        gcx.torch.plan([nn.Linear(2, 2)])
