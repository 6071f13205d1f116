"""What the layers of torch declare, checked against autograd and read back from the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

import gcx.torch
from gcx.layout import Layout
from gcx.torch._fan_in import FanIn
from gcx.torch._layers import TORCH_NN, _activation, _embedding, _norm
from gcx.torch._plan import decide

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def _fan_in(layer: nn.Module, name: str) -> FanIn:
    found = {d.name: d.fan_in for d in decide(layer).values()}[name]
    assert found is not None
    return found


def _output_units(layout: Layout, view: Tensor) -> Tensor:
    """Number each element of a weight by the output unit it belongs to, as the layout says."""
    fan_in = layout.fan_in_axes(view.ndim)
    kept = [1 if axis in fan_in else n for axis, n in enumerate(view.shape)]
    return torch.arange(view.new_empty(kept).numel()).reshape(kept).expand(view.shape)


def _channels(output: Tensor) -> Tensor:
    return output.transpose(0, 1).flatten(1).sum(1)


def _features(output: Tensor) -> Tensor:
    return output.flatten(0, -2).sum(0)


def _channels_of(layer: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    return layer, _channels(layer(torch.randn(shape)))


def _features_of(layer: nn.Module, *shapes: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    output = layer(*[torch.randn(shape) for shape in shapes])
    return layer, _features(output[0] if isinstance(output, tuple) else output)


def _cell_state_of(layer: nn.LSTM, *shape: int) -> tuple[nn.Module, Tensor]:
    """The new cell state, which depends on three of four gates, from one that is not zero."""
    _, (_, cell) = layer(torch.randn(shape), (torch.randn(1, 2, 4), torch.randn(1, 2, 4)))
    return layer, _features(cell)


def _lstm_cell() -> tuple[nn.Module, Tensor]:
    layer = nn.LSTMCell(3, 4)
    hidden, _ = layer(torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4)))
    return layer, _features(hidden)


def _heads_of(**options: int) -> tuple[nn.Module, Tensor]:
    """Attention with heads of size 1 and no mixing after it: an output for each head."""
    width = 4
    layer = nn.MultiheadAttention(width, num_heads=width, add_bias_kv=True, **options)
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(width))
    size = {"key": options.get("kdim", width), "value": options.get("vdim", width)}
    query = torch.randn(3, width)
    key, value = torch.randn(5, size["key"]), torch.randn(5, size["value"])
    return layer, _features(layer(query, key, value)[0])


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
    layer, outputs = make()
    weight, fan_in = layer.get_parameter(name), _fan_in(layer, name)
    seen: set[int] = set()
    for output in outputs:
        (grad,) = torch.autograd.grad(output, weight, retain_graph=True)
        units = _output_units(fan_in.layout, fan_in.view(weight))
        depends = fan_in.view(grad) != 0
        touched = set(units[depends].tolist())
        assert len(touched) == units_per_output
        assert depends[torch.isin(units, torch.tensor(sorted(touched)))].all()
        assert not touched & seen
        seen |= touched


def test_every_layer_with_a_fan_in_is_checked() -> None:
    checked = {type(make()[0]) for make, _, _ in LAYERS.values()}
    no_fan_in = {_embedding, _norm, _activation}
    assert checked == {kind for kind, rule in TORCH_NN.items() if rule not in no_fan_in}


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
parameter                  shape    layout  reason
cls_token                  1x1x4    -       unknown: nobody declared Zoo.cls_token
embed.weight               7x4      -       embedding: a row is an input, not an output unit
conv.weight                4x3x3x3  o...    Conv2d
up.weight                  4x3x2x2  oio...  ConvTranspose2d, 2 groups: seen as 2x2x3x2x2
up.bias                    6        -       bias
norm.weight                2x4      -       norm
norm.bias                  2x4      -       bias
attention.in_proj_weight   12x4     o...    MultiheadAttention
attention.in_proj_bias     12       -       bias
attention.bias_k           1x1x4    -       token: appended to the keys and values
attention.bias_v           1x1x4    -       token: appended to the keys and values
attention.out_proj.weight  4x4      o...    Linear
attention.out_proj.bias    4        -       bias
one.weight                 4x1      -       fan-in 1: subtracting its mean would freeze it
one.bias                   4        -       bias
head.weight                7x4      o...    Linear
head.bias                  7        -       bias
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


def test_tied_parameter_of_two_rules_is_left_alone() -> None:
    model = Zoo()
    model.head.weight = model.embed.weight
    assert _reason(model, "embed.weight") == (
        "tied, and the rules differ: embedding: a row is an input, not an output unit; "
        "head.weight: Linear"
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


def test_subclass_follows_the_rule_of_its_base() -> None:
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora_a = nn.Parameter(torch.zeros(2, 4))

    assert _is_centralized(LowRank(), "weight")
    assert _reason(LowRank(), "lora_a") == "unknown: nobody declared LowRank.lora_a"


def test_integers_are_left_alone() -> None:
    layer = nn.Linear(4, 2)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
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


@pytest.mark.parametrize("apply", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrized_weight_follows_its_owner(apply: Callable[[nn.Module], nn.Module]) -> None:
    assert _is_centralized(apply(nn.Linear(4, 3)), "parametrizations.weight.original")


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


def test_row_of_a_grouped_transposed_convolution_has_the_view_of_its_layout() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    row = gcx.torch.plan(layer)[0]
    assert row.view == (2, 2, 3, 3, 3)
    grad = torch.randn_like(layer.weight)
    by_hand = gcx.centralize(grad.view(row.view), layout=row.layout).view(row.shape)
    layer.weight.grad = grad
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, layer)
    optimizer.step()
    torch.testing.assert_close(layer.weight.grad, by_hand)


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


def test_plan_is_of_a_module() -> None:
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module, not a list"):
        gcx.torch.plan([nn.Linear(2, 2)])
