"""What the layers of transformers declare, with transformers itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gcx.torch
from gcx import Layout

from torch_fan_in import (
    assert_fan_in_is_support,
    centralized_outside_of_torch,
    declared_layout,
    features,
    unknown_in,
)

WIDTH, EXPERTS = 4, 2


def _layer(qualified: str, *args: Any) -> nn.Module:
    """Make a layer of a model, such as "aria.AriaExperts"."""
    name, _, kind = qualified.partition(".")
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    layer: nn.Module = getattr(module, kind)(*args)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


Output = tuple[nn.Module, Tensor, str]


def _only(name: str, layer: nn.Module) -> nn.Module:
    """Experts that mix nothing after the weight of this name."""
    if name != "down_proj":
        layer.down_proj.data.copy_(torch.eye(WIDTH))
    return layer


def _experts(layer: nn.Module, name: str = "down_proj") -> Output:
    """One output for each expert and feature, of experts that are given a token each."""
    chosen, weights = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    return layer, _only(name, layer)(torch.rand(EXPERTS, WIDTH), chosen, weights).flatten(), name


def _all_experts(layer: nn.Module, name: str, *weights: Tensor) -> Output:
    """The same, of experts that are all in use."""
    return layer, _only(name, layer)(torch.rand(EXPERTS, WIDTH), *weights).flatten(), name


def _config(*experts: str, **more: Any) -> SimpleNamespace:
    """Configuration of experts as wide inside as outside, with a gate that is never closed."""
    sizes = dict.fromkeys(experts, EXPERTS) | {"hidden_size": WIDTH, "intermediate_size": WIDTH}
    return SimpleNamespace(
        **sizes,
        moe_intermediate_size=WIDTH,
        hidden_act="tanh",
        _experts_implementation="eager",
        **more,
    )


def _mixtral() -> nn.Module:
    return _layer("mixtral.MixtralExperts", LOCAL)


def _nemotron() -> nn.Module:
    config = _config("n_routed_experts", moe_latent_size=None, mlp_hidden_act="tanh")
    return _layer("nemotron_h.NemotronHExperts", config)


def _dbrx(name: str) -> Output:
    config = _config("moe_num_experts", ffn_hidden_size=WIDTH, ffn_act_fn={"name": "tanh"})
    layer = _layer("dbrx.DbrxExpertGLU", config)
    stacks = [w.view(EXPERTS, WIDTH, WIDTH) for w in (layer.w1, layer.v1, layer.w2)]
    if name != "w2":
        stacks[-1].data.copy_(torch.eye(WIDTH))
    outputs = [layer(torch.rand(1, WIDTH), *matrices) for matrices in zip(*stacks, strict=True)]
    return layer, torch.cat(outputs).flatten(), name


def _router() -> Output:
    sizes = SimpleNamespace(num_experts_per_tok=1, num_local_experts=3, hidden_size=5)
    layer = _layer("mixtral.MixtralTopKRouter", sizes)
    return layer, features(layer(torch.rand(2, 5))[0]), "weight"


def _each(layer: nn.Module, *inputs: Any) -> Output:
    """One output for each place and feature."""
    return layer, layer(*inputs).flatten(), "weight"


def _features(layer: nn.Module, *shape: int) -> Output:
    return layer, features(layer(torch.rand(shape))), "weight"


GPT_OSS = _config("num_local_experts", swiglu_alpha=1.0, swiglu_limit=100.0)
LONGCAT = _config("n_routed_experts", zero_expert_num=0, expert_ffn_hidden_size=WIDTH)
LOCAL, ARIA = _config("num_local_experts"), _config("moe_num_experts")
_gpt_oss = partial(_layer, "gpt_oss.GptOssExperts", GPT_OSS)
_longcat = partial(_layer, "longcat_flash.LongcatFlashExperts", LONGCAT)
_llama4 = partial(_layer, "llama4.Llama4TextExperts", LOCAL)
_inkling = partial(_layer, "inkling.InklingSharedExperts", _config("n_shared_experts"))

SUPPORT: dict[str, tuple[Callable[[], Output], int]] = {
    "Conv1D": (lambda: _features(Conv1D(3, 5), 2, 5), 1),
    "router": (_router, 1),
    "experts (E, out, in)": (lambda: _experts(_mixtral()), 1),
    "experts (E, 2 out, in)": (lambda: _experts(_mixtral(), "gate_up_proj"), 2),
    "experts without gate": (lambda: _experts(_nemotron()), 1),
    "experts without gate, up": (lambda: _experts(_nemotron(), "up_proj"), 1),
    "experts (E, in, out)": (lambda: _experts(_gpt_oss()), 1),
    "experts (E, in, 2 out)": (lambda: _experts(_gpt_oss(), "gate_up_proj"), 2),
    "experts (E, in, out), Aria": (lambda: _experts(_layer("aria.AriaExperts", ARIA)), 1),
    "experts of LongcatFlash": (lambda: _experts(_longcat()), 1),
    "experts of LongcatFlash, up": (lambda: _experts(_longcat(), "gate_up_proj"), 2),
    "experts of Step": (lambda: _experts(_layer("step3p7.Step3p7Experts", LOCAL)), 1),
    "experts of Llama 4": (lambda: _all_experts(_llama4(), "down_proj"), 1),
    "experts of Llama 4, up": (lambda: _all_experts(_llama4(), "gate_up_proj"), 2),
    "shared experts of Inkling": (lambda: _all_experts(_inkling(), "down_proj", torch.eye(2)), 1),
    "shared experts, up": (lambda: _all_experts(_inkling(), "up_proj", torch.eye(2)), 1),
    "experts of DBRX": (lambda: _dbrx("w2"), 1),
    "experts of DBRX, up": (lambda: _dbrx("v1"), 1),
    "experts of JetMoe": (
        lambda: _each(
            _layer("jetmoe.JetMoeParallelExperts", EXPERTS, 5, 3), torch.rand(2, 5), [1, 1]
        ),
        1,
    ),
    "codebooks (N, out, in)": (
        lambda: _each(_layer("moshi.MoshiFlexibleLinear", 5, 4, 2), torch.rand(1, 2, 5)),
        1,
    ),
    "codebooks (N, in, out)": (
        lambda: _each(
            _layer("csm.CsmCodebooksHead", 5, 3, 4), torch.rand(1, 2, 5), torch.arange(1, 3)
        ),
        1,
    ),
    "groups": (lambda: _features(_layer("convbert.GroupedLinearLayer", 6, 4, 2), 1, 3, 6), 1),
}


@pytest.mark.parametrize("case", SUPPORT)
def test_declared_fan_in_is_what_autograd_sees(case: str) -> None:
    torch.manual_seed(0)
    make, units_per_output = SUPPORT[case]
    assert_fan_in_is_support(*make(), units_per_output)


def test_fan_in_of_a_gate_is_where_the_input_has_it() -> None:
    """An input of mean zero does not see a constant that is added to a weight over its fan-in."""
    torch.manual_seed(0)
    config = SimpleNamespace(num_attention_heads=2, lru_width=8)
    layer = _layer("recurrent_gemma.RecurrentGemmaRglru", config)
    x = torch.randn(1, 3, 2, 4)
    x = (x - x.mean(-1, keepdim=True)).flatten(2)
    positions = torch.arange(3)[None]
    with torch.no_grad():
        before = layer(x, positions)
        for name in ("input_gate_weight", "recurrent_gate_weight"):
            axes = declared_layout(layer, name).fan_in_axes(3)
            weight = layer.get_parameter(name)
            weight += torch.randn([1 if k in axes else n for k, n in enumerate(weight.shape)])
            layer.recurrent_states = None
        torch.testing.assert_close(layer(x, positions), before)


def test_swiftformer_multiplies_from_the_right() -> None:
    kind = "swiftformer.SwiftFormerEfficientAdditiveAttention"
    layer = _layer(kind, SimpleNamespace(), 4)
    assert str(declared_layout(layer, "w_g")) == "io"


def test_experts_that_do_not_say_their_order_are_unknown() -> None:
    layer = _mixtral()
    del layer.is_transposed
    assert {row.reason for row in gcx.torch.plan(layer)} == {
        "unknown: nobody declared MixtralExperts.gate_up_proj",
        "unknown: nobody declared MixtralExperts.down_proj",
    }


def _experts_and_router(
    name: str, layout: str = "boi", router: str = "TopKRouter"
) -> dict[str, str]:
    return {
        f"{name}{router}.weight": "oi",
        f"{name}Experts.gate_up_proj": layout,
        f"{name}Experts.down_proj": layout,
    }


# Models that can be made from their default configuration, and the weights in them that are
# centralized in layers of their own. All other weights that are centralized are in those of torch.
OF_TORCH = """
albert bart beit bert blip bloom clip convnext convnextv2 cvt deberta deberta-v2 deit dinov2
distilbert electra falcon gemma gpt_neox levit llama mamba mamba2 mistral opt perceiver phi qwen2
qwen3 reformer roberta rwkv sam seggpt siglip swin swinv2 t5 vit vit_mae vits wav2vec2 whisper
"""
MODELS: dict[str, dict[str, str]] = {
    **{name: {} for name in OF_TORCH.split()},
    "deepseek_v3": _experts_and_router("DeepseekV3", router="TopkRouter"),
    "deepseek_v4": {
        **_experts_and_router("DeepseekV4"),
        "DeepseekV4HashRouter.weight": "oi",
        "DeepseekV4HyperConnection.fn": "oi",
        "DeepseekV4HyperHead.hc_fn": "oi",
    },
    "funnel": {"FunnelRelMultiheadAttention.r_kernel": "ioo"},
    "gemma3": {"Gemma3MultiModalProjector.mm_input_projection_weight": "io"},
    "gpt2": {"Conv1D.weight": "io"},
    "gpt_oss": _experts_and_router("GptOss", "bio"),
    "ibert": {"QuantLinear.weight": "oi"},
    "llama4_text": {"Llama4TextExperts.gate_up_proj": "bio", "Llama4TextExperts.down_proj": "bio"},
    "mixtral": _experts_and_router("Mixtral"),
    "qwen3_moe": _experts_and_router("Qwen3Moe"),
    "qwen3_next": _experts_and_router("Qwen3Next"),
    "xlnet": {f"XLNetRelativeAttention.{name}": "ioo" for name in "qkvr"}
    | {"XLNetRelativeAttention.o": "oii"},
    "zamba": {"ZambaMambaMixer.x_proj_weight": "boi", "ZambaMambaMixer.dt_proj_weight": "boi"},
}


def _of_transformers(name: str) -> nn.Module:
    config = transformers.AutoConfig.for_model(name, architectures=[])
    for part in [config, *vars(config).values()]:
        for layers in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers"):
            if isinstance(part, transformers.PretrainedConfig) and hasattr(part, layers):
                with suppress(NotImplementedError):  # it is worked out from something else
                    setattr(part, layers, min(getattr(part, layers), 8))
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "true_hidden_size"), 64),
    **dict.fromkeys(("intra_bottleneck_size", "intermediate_size", "d_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    "vocab_size": 99,
    "embedding_size": 16,
    "embedding_rank": 16,
    "num_key_value_heads": 2,
}
# Some of these read weights in ways of their own.
CHECKED = ("MobileBert", "NeoMME", "Bert", "Albert", "GPT2LMHead", "XLNet", "DebertaV2", "Mixtral")


@pytest.mark.parametrize("name", CHECKED)
def test_plan_agrees_with_a_forward_pass(name: str) -> None:
    torch.manual_seed(0)
    kind = next(
        getattr(transformers, f"{name}{task}")
        for task in ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "Model")
        if hasattr(transformers, f"{name}{task}")
    )
    config = kind.config_class()
    for key, value in SMALL.items():
        if hasattr(config, key):
            setattr(config, key, value)
    model = kind(config).eval()
    found = gcx.torch.check_plan(model, input_ids=torch.randint(5, 90, (2, 7)))
    assert len(found.agree) > 5
    assert found.disagree == {}


def test_tied_projection_that_multiplies_from_both_sides() -> None:
    with torch.device("meta"):
        model = transformers.NeoMMEForMaskedLM(transformers.NeoMMEConfig(num_hidden_layers=1))
        head = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig())
    reason = gcx.torch.plan(model)["model.embed_tokens.embedding_projection.weight"].reason
    assert reason.startswith("tied, and the rules differ: Linear; unembedding_projection.weight")
    assert declared_layout(head, "cls.predictions.dense.weight") == Layout("io")


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_unknown_in_a_model_of_transformers(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _of_transformers(name)
    assert unknown_in(model) == []
    assert centralized_outside_of_torch(model) == MODELS[name]
