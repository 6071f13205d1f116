"""What the adapters of peft declare, with peft itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from peft.tuners.lora.variants import BlockDiagonalLinear
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import gcx.torch
from gcx import Layout
from gcx.testing import assert_centralized

from torch_fan_in import assert_fan_in_is_support, features


def test_block_diagonal_lora() -> None:
    torch.manual_seed(0)
    layer = BlockDiagonalLinear(6, 4, 2)
    assert_fan_in_is_support(layer, features(layer(torch.rand(3, 6))), "weight")


def test_lora_of_an_embedding() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Embedding(7, 4)), config)
    outputs = features(model(torch.arange(7)))
    assert_fan_in_is_support(model, outputs, "base_model.model.0.lora_embedding_B.default")


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, 6)
        self.conv = nn.Conv2d(4, 6, 3)


def _adapters(model: nn.Module, config: Any) -> dict[str, tuple[str | None, str]]:
    """Layout and reason of each parameter that peft adds."""
    plan = gcx.torch.plan(peft.get_peft_model(model, config))
    short = {row.name.removeprefix("base_model.model."): row for row in plan}
    own = {name for name, _ in Adapted().named_parameters()}
    return {
        name.replace(".default", ""): (row.layout and str(row.layout), row.reason)
        for name, row in short.items()
        if "base_layer" not in name and name not in own
    }


def test_lora_and_dora() -> None:
    config = peft.LoraConfig(target_modules=["embed", "fc", "conv"], r=2, use_dora=True)
    length = (None, "DoRA: the length of a weight")
    assert _adapters(Adapted(), config) == {
        "embed.lora_embedding_A": (None, "embedding: a row is an input, not an output unit"),
        "embed.lora_embedding_B": ("oi", "Embedding"),
        "embed.lora_magnitude_vector.weight": length,
        "fc.lora_A.weight": ("o...", "Linear"),
        "fc.lora_B.weight": ("o...", "Linear"),
        "fc.lora_magnitude_vector.weight": length,
        "conv.lora_A.weight": ("o...", "Conv2d"),
        "conv.lora_B.weight": ("o...", "Conv2d"),
        "conv.lora_magnitude_vector.weight": length,
    }


def test_lora_of_rank_one_is_not_frozen() -> None:
    found = _adapters(Adapted(), peft.LoraConfig(target_modules=["fc"], r=1))
    assert found["fc.lora_A.weight"] == ("o...", "Linear")
    assert found["fc.lora_B.weight"] == (None, "fan-in 1: subtracting its mean would freeze it")


def test_lora_of_experts_does_not_mix_them() -> None:
    sizes = {"num_local_experts": 2, "hidden_size": 4, "intermediate_size": 3}
    model = nn.Sequential(MixtralExperts(SimpleNamespace(**sizes, hidden_act="relu")))
    config = peft.LoraConfig(target_modules=[], target_parameters=["0.down_proj"], r=2)
    found = _adapters(model, config)
    assert found["0.lora_A.weight"] == ("o...", "Linear")
    assert found["0.lora_B.weight"] == (None, "factors of several experts, interleaved")


def test_adalora() -> None:
    config = peft.AdaLoraConfig(target_modules=["fc"], init_r=4, total_step=10)
    found = _adapters(Adapted(), config)
    assert found["fc.lora_A"] == found["fc.lora_B"] == ("oi", "SVDLinear")
    assert found["fc.lora_E"] == (None, "AdaLoRA: singular values")


def test_lily_multiplies_stacks_from_the_right() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6)),
        peft.LilyConfig(target_modules=["0"], r=3, num_B=2, init_weights=False),
    )
    row = gcx.torch.plan(model)["base_model.model.0.lily_B.default.weight"]
    assert (row.shape, row.layout) == ((6, 6), Layout("(bi)o", b=2))
    output = features(model(torch.rand(5, 8)))[4]
    (grad,) = torch.autograd.grad(output, model.get_parameter(row.name))
    assert (grad != 0).equal((torch.arange(6) == 4).expand(6, 6))


def test_ia3() -> None:
    config = peft.IA3Config(target_modules=["fc", "conv"], feedforward_modules=["fc"])
    scale = (None, "scale of a layer, a norm or logits")
    assert _adapters(Adapted(), config) == {"fc.ia3_l": scale, "conv.ia3_l": scale}


def _whole_units(grad: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Tell for each unit if an output depends on it; an error if it depends on a part of it."""
    view, axes = layout.split(grad.shape)
    depends = grad.reshape(view) != 0
    assert depends.any(axes).equal(depends.all(axes))
    return depends.any(axes)


# Factors that are multiplied by weights element by element, or divided by their length.
NORMED = {
    "DeloraConfig": {"delora_A": "oi", "delora_B": "oi"},
    "GloraConfig": {"glora_A.Xu": "oi"},
    "HiraConfig": {"hira_A": "oi"},
}
# Layouts by adapter; those in the second place are of factors that an input meets first.
FACTORS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, str]]] = {
    "C3AConfig": ({"block_size": 4}, {"c3a_kernel": "oii"}, {}),
    "DeftConfig": ({"r": 2}, {}, {"deft_R": "oi"}),
    "DeloraConfig": ({"r": 2}, {}, {}),
    "GloraConfig": ({"r": 2}, {"glora_A.Xd": "oi", "glora_B.Xd": "oi"}, {"glora_B.Xu": "oi"}),
    "GraloraConfig": ({"r": 4, "gralora_k": 2}, {"gralora_B": "bio"}, {"gralora_A": "bio"}),
    "HiraConfig": ({"r": 2}, {"hira_B": "oi"}, {}),
    "LoKrConfig": ({"r": 4}, {"lokr_w1": "o...", "lokr_w2": "o..."}, {}),
    "MissConfig": ({"r": 2}, {"miss_block": "io"}, {}),
    "PolyConfig": (
        {"r": 2, "n_tasks": 1, "n_splits": 2, "n_skills": 3},
        {"poly_lora_B": "bbio"},
        {"poly_lora_A": "bbio"},
    ),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_with_a_fan_in(name: str) -> None:
    """Outputs are made of whole units, and an input of mean zero does not see what GC removes."""
    torch.manual_seed(0)
    options, last, first = FACTORS[name]
    config = getattr(peft, name)(target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval()
    adapted = {p: n for n, p in model.named_parameters() if "base_layer" not in n}
    for parameter in adapted:
        parameter.data = torch.rand_like(parameter) + 0.1
    rows = gcx.torch.plan(model)
    x = torch.randn(5, 8)
    x = (x.view(5, 2, 4) - x.view(5, 2, 4).mean(-1, keepdim=True)).flatten(1)  # of each split

    def outputs() -> torch.Tensor:
        if name != "PolyConfig":
            return features(model(x))
        return features(model.base_model(x[:, None], task_ids=torch.zeros(5, dtype=torch.long)))

    found = {}
    for parameter, full in adapted.items():
        row = rows[full]
        short = full.removeprefix("base_model.model.0.").replace(".default", "")
        assert not row.reason.startswith("unknown")
        if row.layout is None:
            continue
        found[short] = str(row.layout)
        for output in outputs():
            (grad,) = torch.autograd.grad(output, parameter, retain_graph=True)
            units = _whole_units(grad, row.layout)
            assert units.any()
            assert short not in last or not units.all()
        if short in first:
            view, axes = row.layout.split(row.shape)
            before = outputs()
            shift = torch.rand([1 if k in axes else n for k, n in enumerate(view)])
            parameter.data += shift.expand(view).reshape(row.shape)
            torch.testing.assert_close(outputs(), before)
    assert found == {**last, **first, **NORMED.get(name, {})}


OTHER_ADAPTERS = {
    "HRAConfig": {},
    "LoHaConfig": {"r": 2},
    "OFTConfig": {"oft_block_size": 4},
    "RandLoraConfig": {},
    "VBLoRAConfig": {"vector_length": 2, "num_vectors": 8},
    "VeraConfig": {},
}


@pytest.mark.parametrize("name", OTHER_ADAPTERS)
def test_factors_of_weights_are_listed_and_left_alone(name: str) -> None:
    config = getattr(peft, name)(target_modules=["fc"], **OTHER_ADAPTERS[name])
    for layout, reason in _adapters(Adapted(), config).values():
        assert layout is None
        assert not reason.startswith("unknown")


def test_lora_of_attention_whose_frozen_weights_are_registered_anew() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    model = peft.get_peft_model(
        nn.ModuleDict({"attention": attention}),
        peft.LoraConfig(target_modules=["attention"], r=2, init_lora_weights=False),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, model)
    lora = {name: p for name, p in model.named_parameters() if "lora" in name}
    start = {name: p.detach().clone() for name, p in lora.items()}
    for x in torch.rand(3, 5, 1, 8, dtype=torch.float64):
        optimizer.zero_grad()
        model.base_model.model["attention"](x, x, x)[0].square().sum().backward()
        optimizer.step()
    for name, parameter in lora.items():
        assert_centralized(parameter, start=start[name])
