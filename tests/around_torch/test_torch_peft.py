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
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import gcx.torch
from gcx import Layout
from gcx.testing import assert_centralized

from torch_fan_in import features


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, 8)
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(self.embed(ids)), self.conv(images)


EMBEDDING, VECTOR = "embedding: a row is an input, not an output unit", "a vector has no fan-in"
PRODUCT = "factor of a product element by element, or of three factors"
ROTATION, DORA = "rotation: coordinates or directions of it", "DoRA: the length of a weight"
MIXING, SCALE = "coefficients that mix weights or vectors", "scale of a layer, a norm or logits"
BOTH_SIDES, SINGULAR = "used from both sides: no axis is fan-in alone", "AdaLoRA: singular values"
ALL, OF_FC = ["embed", "fc", "conv"], {"target_modules": ["fc"]}
# By the name of a config: its options, and the layout or reason of what it adds to a layer.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "LoraConfig": (
        {"target_modules": ALL, "r": 2, "use_dora": True},
        {
            "embed.lora_embedding_A": EMBEDDING,
            "embed.lora_embedding_B": "oi",
            **{f"{name}.lora_{part}.weight": "o..." for name in ALL[1:] for part in "AB"},
            **{f"{name}.lora_magnitude_vector.weight": DORA for name in ALL},
        },
    ),
    "AdaLoraConfig": (
        {"init_r": 4, "total_step": 10},
        {"fc.lora_A": "oi", "fc.lora_B": "oi", "fc.lora_E": SINGULAR, "fc.ranknum": VECTOR},
    ),
    "DeftConfig": ({"r": 2}, {"fc.deft_P": BOTH_SIDES, "fc.deft_R": "oi"}),
    "DeloraConfig": (
        {"r": 2},
        {"fc.delora_A": "oi", "fc.delora_B": "oi", "fc.delora_lambda": VECTOR},
    ),
    "GraloraConfig": (
        {"r": 4, "gralora_k": 2},
        {"fc.gralora_A": "bio", "fc.gralora_B": "bio"},
    ),
    "LoKrConfig": ({"r": 4}, {"fc.lokr_w1": "o...", "fc.lokr_w2": "o..."}),
    "MissConfig": ({"r": 2}, {"fc.miss_block": "io"}),
    "IA3Config": (
        {"target_modules": ALL[1:], "feedforward_modules": ["fc"]},
        {"fc.ia3_l": SCALE, "conv.ia3_l": SCALE},
    ),
    "HRAConfig": ({}, {"fc.hra_u": ROTATION}),
    "LoHaConfig": ({"r": 2}, {f"fc.hada_w{k}_{part}": PRODUCT for k in "12" for part in "ab"}),
    "OFTConfig": ({"oft_block_size": 4}, {"fc.oft_R.weight": ROTATION}),
    "RandLoraConfig": ({}, {"fc.randlora_lambda": SCALE, "fc.randlora_gamma": SCALE}),
    "VBLoRAConfig": (
        {"vector_length": 2, "num_vectors": 8},
        {f"fc.vblora_{name}": MIXING for name in ("logits_A", "logits_B", "vector_bank")},
    ),
    "VeraConfig": ({}, {"fc.vera_lambda_b": VECTOR, "fc.vera_lambda_d": VECTOR}),
}


def adapted(model: nn.Module, config: Any) -> tuple[Any, dict[str, str]]:
    """The model, and the full name of each parameter that peft has added."""
    torch.manual_seed(0)
    own = set(model.parameters())
    model = peft.get_peft_model(model, config).eval()
    added = {n: p for n, p in model.named_parameters() if p not in own}
    for parameter in added.values():
        parameter.data = torch.rand_like(parameter) + 0.1  # some are made as zeros
    short = (name.removeprefix("base_model.model.").replace(".default", "") for name in added)
    return model, dict(zip(short, added, strict=True))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    """A forward pass agrees on all that have a fan-in."""
    options, expected = ADAPTERS[name]
    model, names = adapted(Adapted(), getattr(peft, name)(**OF_FC | options))
    plan = gcx.torch.plan(model)
    assert {n: str(plan[full].layout or plan[full].reason) for n, full in names.items()} == expected
    found = gcx.torch.check_plan(model, torch.randint(10, (3,)), torch.rand(1, 4, 5, 5))
    with_fan_in = {full for full in names.values() if plan[full].layout}
    assert with_fan_in == {*found.agree} & {*names.values()}


def test_block_diagonal_lora() -> None:
    layer = BlockDiagonalLinear(6, 4, 2)
    assert gcx.torch.check_plan(layer, torch.rand(3, 6)).agree == ("weight",)


def test_lora_of_rank_one_is_not_frozen() -> None:
    model, names = adapted(Adapted(), peft.LoraConfig(**OF_FC, r=1))
    row = gcx.torch.plan(model)[names["fc.lora_B.weight"]]
    assert row.reason == "fan-in 1: subtracting its mean would freeze it"


def test_lora_of_experts_does_not_mix_them() -> None:
    sizes = {"num_local_experts": 2, "hidden_size": 4, "intermediate_size": 3}
    experts = MixtralExperts(SimpleNamespace(**sizes, hidden_act="relu"))
    config = peft.LoraConfig(target_modules=[], target_parameters=["0.down_proj"], r=2)
    model, names = adapted(nn.Sequential(experts), config)
    rows = [gcx.torch.plan(model)[names[f"0.lora_{part}.weight"]] for part in "AB"]
    assert [row.reason for row in rows] == ["Linear", "factors of several experts, interleaved"]


def test_lora_of_attention_whose_frozen_weights_are_registered_anew() -> None:
    config = peft.LoraConfig(target_modules=["0"], r=2)
    attention = nn.Sequential(nn.MultiheadAttention(8, 2, dtype=torch.float64))
    model, names = adapted(attention, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, model)
    lora = [model.get_parameter(full) for full in names.values() if "lora" in full]
    start = [parameter.detach().clone() for parameter in lora]
    for x in torch.rand(3, 5, 1, 8, dtype=torch.float64):
        optimizer.zero_grad()
        model.base_model.model[0](x, x, x)[0].square().sum().backward()
        optimizer.step()
    for parameter, before in zip(lora, start, strict=True):
        assert_centralized(parameter, start=before)


def _whole_units(grad: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Tell for each unit if an output depends on it; an error if it depends on a part of it."""
    view, axes = layout.split(grad.shape)
    depends = grad.reshape(view) != 0
    assert depends.any(axes).equal(depends.all(axes))
    return depends.any(axes)


# What a forward pass does not tell, by config: options, and layouts; of factors that are multiplied
# by weights element by element, of those that an output meets last, and an input first.
FACTORS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, str], dict[str, str]]] = {
    "C3AConfig": ({"block_size": 4}, {}, {"c3a_kernel": "oii"}, {}),
    "GloraConfig": (
        {"r": 2},
        {"glora_A.Xu": "oi"},
        {"glora_A.Xd": "oi", "glora_B.Xd": "oi"},
        {"glora_B.Xu": "oi"},
    ),
    "HiraConfig": ({"r": 2}, {"hira_A": "oi"}, {"hira_B": "oi"}, {}),
    "LilyConfig": (
        {"r": 3, "num_B": 2},
        {"lily_A.weight": "o...", "lily_router.weight": "o..."},
        {"lily_B.weight": "(bi)o"},
        {},
    ),
    "PolyConfig": (
        {"r": 2, "n_tasks": 1, "n_splits": 2, "n_skills": 3},
        {},
        {"poly_lora_B": "bbio"},
        {"poly_lora_A": "bbio"},
    ),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_with_a_fan_in(name: str) -> None:
    """Outputs are made of whole units, and an input of mean zero does not see what GC removes."""
    options, normed, last, first = FACTORS[name]
    config = getattr(peft, name)(target_modules=["0"], **options)
    model, names = adapted(nn.Sequential(nn.Linear(8, 8)), config)
    rows = gcx.torch.plan(model)
    x = torch.randn(5, 8)
    x = (x.view(5, 2, 4) - x.view(5, 2, 4).mean(-1, keepdim=True)).flatten(1)  # of each split

    def outputs() -> torch.Tensor:
        if name != "PolyConfig":
            return features(model(x))
        return features(model.base_model(x[:, None], task_ids=torch.zeros(5, dtype=torch.long)))

    found = {}
    for in_model, full in names.items():
        row, parameter = rows[full], model.get_parameter(full)
        short = in_model.removeprefix("0.")
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
    assert found == {**normed, **last, **first}
