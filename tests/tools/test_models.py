"""The shapes in `benchmarks.throughput.models` are those of the models themselves."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from benchmarks.throughput.models import MODELS, Model, llama3

Shapes = Counter[tuple[int, ...]]


def shapes_of(module: nn.Module) -> Shapes:
    return Counter(tuple(parameter.shape) for parameter in module.parameters())


def shapes_in(model: Model) -> Shapes:
    return Counter([*(weight.shape for weight in model.weights), *model.others])


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
@pytest.mark.parametrize(
    ("name", "in_timm"), [("resnet50", "resnet50"), ("vit-b16", "vit_base_patch16_224")]
)
def test_of_timm(name: str, in_timm: str) -> None:
    from timm_models import new_model

    with torch.device("meta"):
        assert shapes_of(new_model(in_timm)) == shapes_in(MODELS[name])


@pytest.mark.parametrize(("name", "width", "blocks"), [("gpt2", 768, 12), ("gpt2-xl", 1600, 48)])
def test_gpt2(name: str, width: int, blocks: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=width, n_layer=blocks, n_head=width // 64)
    with torch.device("meta"):
        assert shapes_of(transformers.GPT2LMHeadModel(config)) == shapes_in(MODELS[name])


def test_llama3() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        found = shapes_of(transformers.LlamaForCausalLM(config))
    assert found == shapes_in(llama3("whole", 32, has_embedding=True))
