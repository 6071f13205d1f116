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
    sizes = SimpleNamespace(
        num_local_experts=2, hidden_size=4, intermediate_size=3, hidden_act="relu"
    )
    model = nn.Sequential(MixtralExperts(sizes))
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


OTHER_ADAPTERS = {
    "HRAConfig": {},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
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
        assert reason.startswith("unknown: nobody declared") or reason == "a vector has no fan-in"
