"""What the layers of torch declare, checked against autograd."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

import gcx.torch
from gcx.plan import LeaveAlone
from gcx.torch._layers import CONVOLUTIONS, TORCH_NN, TRANSPOSED

from torch_fan_in import assert_fan_in_is_support, channels, features

pytestmark = [
    pytest.mark.one_framework,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def _outputs(layer: nn.Module, *shapes: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """Call a layer on random inputs, of which the last axes are features, or of images channels."""
    output = layer(*[torch.randn(shape) for shape in shapes])
    output = output[0] if isinstance(output, tuple) else output
    is_convolution = isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    return layer, channels(output) if is_convolution else features(output)


def _cell_state(layer: nn.LSTM | nn.LSTMCell, *batch: int) -> tuple[nn.Module, Tensor]:
    """The new cell state, which depends on three of four gates, from one that is not zero."""
    states = torch.randn(*batch, 4), torch.randn(*batch, 4)
    found = layer(torch.randn(*batch, 3), states)
    return layer, features(found[1][1] if isinstance(layer, nn.LSTM) else found[1])


def _heads(**options: int) -> tuple[nn.Module, Tensor]:
    """Attention with heads of size 1 and no mixing after it: an output for each head."""
    width = 4
    layer = nn.MultiheadAttention(width, num_heads=width, add_bias_kv=True, **options)
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(width))
    widths = width, options.get("kdim", width), options.get("vdim", width)
    return layer, features(layer(*[torch.randn(3, size) for size in widths])[0])


class Case(NamedTuple):
    """A layer with one number for each output, a weight of it, and how many of its units enter."""

    make: Callable[[], tuple[nn.Module, Tensor]]
    name: str = "weight"
    units_per_output: int = 1  # more where gates or projections are stacked


LAYERS = {
    "linear": Case(lambda: _outputs(nn.Linear(5, 3), (4, 5))),
    "bilinear": Case(lambda: _outputs(nn.Bilinear(3, 4, 2), (6, 3), (6, 4))),
    "conv1d": Case(lambda: _outputs(nn.Conv1d(4, 3, 3), (2, 4, 8))),
    "conv2d": Case(lambda: _outputs(nn.Conv2d(4, 3, (3, 2)), (2, 4, 7, 7))),
    "conv3d": Case(lambda: _outputs(nn.Conv3d(2, 3, 2), (2, 2, 5, 5, 5))),
    "grouped": Case(lambda: _outputs(nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7))),
    "transposed1d": Case(lambda: _outputs(nn.ConvTranspose1d(4, 3, 3), (2, 4, 8))),
    "grouped-transposed1d": Case(
        lambda: _outputs(nn.ConvTranspose1d(6, 4, 3, groups=2), (2, 6, 8))
    ),
    "grouped-transposed2d": Case(
        lambda: _outputs(nn.ConvTranspose2d(6, 9, 2, groups=3, stride=2), (2, 6, 5, 5))
    ),
    "depthwise-transposed3d": Case(
        lambda: _outputs(nn.ConvTranspose3d(2, 4, 2, groups=2), (1, 2, 4, 4, 4))
    ),
    "attention": Case(_heads, "in_proj_weight", 3),
    "attention-key": Case(lambda: _heads(kdim=3, vdim=2), "k_proj_weight"),
    "rnn": Case(lambda: _outputs(nn.RNN(3, 4), (1, 2, 3)), "weight_ih_l0"),
    "rnn-cell": Case(lambda: _outputs(nn.RNNCell(3, 4), (2, 3), (2, 4)), "weight_hh"),
    "gru": Case(lambda: _outputs(nn.GRU(3, 4), (1, 2, 3)), "weight_ih_l0", 3),
    "gru-cell": Case(lambda: _outputs(nn.GRUCell(3, 4), (2, 3), (2, 4)), "weight_hh", 3),
    "lstm": Case(lambda: _cell_state(nn.LSTM(3, 4), 1, 2), "weight_hh_l0", 3),
    "lstm-projection": Case(
        lambda: _outputs(nn.LSTM(3, 4, proj_size=2), (1, 2, 3)), "weight_hr_l0"
    ),
    "lstm-cell": Case(lambda: _cell_state(nn.LSTMCell(3, 4), 2), "weight_ih", 3),
}


@pytest.mark.parametrize("case", LAYERS)
def test_declared_fan_in_is_what_autograd_sees(case: str) -> None:
    torch.manual_seed(0)
    make, *weight = LAYERS[case]
    assert_fan_in_is_support(*make(), *weight)


def test_every_layer_with_a_fan_in_is_checked() -> None:
    checked = {type(make()[0]) for make, *_ in LAYERS.values()}
    with_fan_in = {
        kind
        for kind, rule in TORCH_NN.items()
        if callable(rule) or not all(isinstance(found, LeaveAlone) for found in rule.values())
    }
    assert checked == with_fan_in - {nn.RNNBase, nn.RNNCellBase}


def _registers_parameters(kind: Any) -> bool:
    if not inspect.isclass(kind) or not issubclass(kind, nn.Module):
        return False
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = [f for base in own for f in vars(base).values() if inspect.isfunction(f)]
    return any("Parameter" in function.__code__.co_names for function in functions)


# But for lazy ones, which become the others, and containers, for which the modules around answer.
OF_TORCH = [
    kind
    for kind in filter(_registers_parameters, vars(nn).values())
    if not issubclass(kind, (LazyModuleMixin, nn.ParameterList, nn.ParameterDict))
]


ARGUMENTS: dict[type[nn.Module], tuple[object, ...]] = {
    nn.Bilinear: (3, 4, 2),
    nn.GroupNorm: (2, 4),
    nn.MultiheadAttention: (4, 2, 0.0, True, True, False, 3, 2),
    nn.PReLU: (),
    nn.RNNBase: ("LSTM", 3, 4),
    nn.RNNCellBase: (3, 4, True, 4),
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), (4, 4, 2)),
    **dict.fromkeys((nn.Linear, nn.Embedding, nn.EmbeddingBag), (7, 4)),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell), (3, 4)),
}


@pytest.mark.parametrize("kind", OF_TORCH, ids=lambda kind: kind.__name__)
def test_every_parameter_of_torch_has_an_answer(kind: type[nn.Module]) -> None:
    """A release of torch with a new layer breaks this."""
    layer = kind(*ARGUMENTS.get(kind, (4,)))
    plan = gcx.torch.plan(layer)
    assert [row.name for row in plan] == [name for name, _ in layer.named_parameters()]
    for row in plan:
        assert not re.match(r"unknown|a (vector|scalar) has no", row.reason)
