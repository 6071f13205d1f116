"""Every kind of weight that one implementation of GC or another gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
if find_spec("timm") is None:
    pytest.skip("needs timm", allow_module_level=True)

import peft
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import gcx.torch

from reference import centralized
from timm_models import new_model


class Tensors(nn.Module):
    """Parameters of a model, used without a layer."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def _lora(r: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 6))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=r))


def _lstm() -> nn.Module:
    return nn.LSTM(3, 4, proj_size=2)


def _attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2, add_bias_kv=True)


def _weight_norm() -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(4, 6, 3))


EXPERTS = SimpleNamespace(
    num_local_experts=2,
    hidden_size=4,
    intermediate_size=3,
    hidden_act="relu",
    swiglu_alpha=1.0,
    swiglu_limit=7.0,
)
ADAPTED = "base_model.model.0"


class Probe(NamedTuple):
    """A parameter of a model, and the axes of its fan-in: of a view, where that has a shape."""

    make: Callable[[], nn.Module]
    name: str
    axes: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None


PROBES = {
    "Linear": Probe(lambda: nn.Linear(5, 3), "weight", (1,)),
    "Linear to one": Probe(lambda: nn.Linear(5, 1), "weight", (1,)),
    "Conv1d": Probe(lambda: nn.Conv1d(4, 6, 3), "weight", (1, 2)),
    "Conv2d": Probe(lambda: nn.Conv2d(4, 6, 3), "weight", (1, 2, 3)),
    "Conv3d": Probe(lambda: nn.Conv3d(4, 6, 3), "weight", (1, 2, 3, 4)),
    "Conv2d, groups": Probe(lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", (1, 2, 3)),
    "Conv2d, depthwise": Probe(lambda: nn.Conv2d(4, 4, 3, groups=4), "weight", (1, 2, 3)),
    "Bilinear": Probe(lambda: nn.Bilinear(3, 4, 2), "weight", (1, 2)),
    "attention, in": Probe(_attention, "in_proj_weight", (1,)),
    "attention, out": Probe(_attention, "out_proj.weight", (1,)),
    "attention, key": Probe(lambda: nn.MultiheadAttention(8, 2, kdim=5), "k_proj_weight", (1,)),
    "LSTM, input": Probe(_lstm, "weight_ih_l0", (1,)),
    "LSTM, hidden": Probe(_lstm, "weight_hh_l0", (1,)),
    "LSTM, projection": Probe(_lstm, "weight_hr_l0", (1,)),
    "LoRA A": Probe(lambda: _lora(2), f"{ADAPTED}.lora_A.default.weight", (1,)),
    "LoRA B": Probe(lambda: _lora(2), f"{ADAPTED}.lora_B.default.weight", (1,)),
    "bias": Probe(lambda: nn.Linear(5, 3), "bias"),
    "LayerNorm": Probe(lambda: nn.LayerNorm(4), "weight"),
    "scalar": Probe(lambda: Tensors(scale=()), "scale"),
    "vector of one": Probe(lambda: Tensors(scale=(1,)), "scale"),
    "ConvTranspose1d": Probe(lambda: nn.ConvTranspose1d(4, 6, 3), "weight", (0, 2)),
    "ConvTranspose2d": Probe(lambda: nn.ConvTranspose2d(4, 6, 3), "weight", (0, 2, 3)),
    "ConvTranspose3d": Probe(lambda: nn.ConvTranspose3d(4, 6, 3), "weight", (0, 2, 3, 4)),
    "ConvTranspose2d, groups": Probe(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", (1, 3, 4), view=(2, 2, 3, 3, 3)
    ),
    "Embedding": Probe(lambda: nn.Embedding(7, 4), "weight"),
    "EmbeddingBag": Probe(lambda: nn.EmbeddingBag(7, 4), "weight"),
    "class token": Probe(lambda: Tensors(cls_token=(1, 1, 8)), "cls_token"),
    "position table": Probe(lambda: Tensors(pos_embed=(1, 9, 8)), "pos_embed"),
    "attention, bias_k": Probe(_attention, "bias_k"),
    "attention, bias_v": Probe(_attention, "bias_v"),
    "LayerNorm of rank 2": Probe(lambda: nn.LayerNorm((5, 4)), "weight"),
    "Swin, bias table": Probe(
        lambda: new_model("swin_tiny_patch4_window7_224"),
        "layers.0.blocks.0.attn.relative_position_bias_table",
    ),
    "LeViT, attention biases": Probe(
        lambda: new_model("levit_128s"), "stages.0.blocks.0.attn.attention_biases"
    ),
    "Linear of one": Probe(lambda: nn.Linear(1, 3), "weight"),
    "LoRA B of rank 1": Probe(lambda: _lora(1), f"{ADAPTED}.lora_B.default.weight"),
    "Conv2d, depthwise 1x1": Probe(lambda: nn.Conv2d(4, 4, 1, groups=4), "weight"),
    "weight_norm, g": Probe(_weight_norm, "parametrizations.weight.original0"),
    "weight_norm, v": Probe(_weight_norm, "parametrizations.weight.original1", (1, 2, 3)),
    "layer scale": Probe(lambda: new_model("fastvit_t8"), "stages.0.blocks.0.layer_scale.gamma"),
    "XCiT, temperature": Probe(
        lambda: new_model("xcit_nano_12_p16_224"), "blocks.0.attn.temperature"
    ),
    "Conv1D of GPT-2": Probe(lambda: Conv1D(6, 4), "weight", (0,)),
    "experts (E, 2 out, in)": Probe(lambda: MixtralExperts(EXPERTS), "gate_up_proj", (2,)),
    "experts (E, out, in)": Probe(lambda: MixtralExperts(EXPERTS), "down_proj", (2,)),
    "experts (E, in, 2 out)": Probe(lambda: GptOssExperts(EXPERTS), "gate_up_proj", (1,)),
    "experts of Llama 4": Probe(lambda: Llama4TextExperts(EXPERTS), "down_proj", (1,)),
}


@pytest.mark.parametrize("case", PROBES)
def test_probe(case: str) -> None:
    torch.manual_seed(0)
    probe = PROBES[case]
    model, beside = probe.make(), nn.Linear(4, 3)  # so that there is something to centralize
    parameter = model.get_parameter(probe.name)
    grad = torch.randn_like(parameter)
    parameter.grad, beside.weight.grad = grad.clone(), torch.rand(3, 4)
    gcx.torch.centralize_grads_(nn.ModuleList([model, beside]))
    if probe.axes is None:
        assert torch.equal(parameter.grad, grad)
    else:
        right = centralized(grad.numpy().reshape(probe.view or grad.shape), probe.axes)
        found = parameter.grad.numpy()
        np.testing.assert_allclose(found, right.reshape(found.shape), atol=1e-6, rtol=0)


def test_all_probes_are_there() -> None:
    assert len(PROBES) == 45
