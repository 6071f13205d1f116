"""What the layers of transformers declare, with transformers itself."""

from __future__ import annotations

import warnings
from contextlib import suppress
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from torch import nn

import gcx.torch
from gcx import Layout

from torch_fan_in import centralized_outside_of_torch, declared_layout, unknown_in

WIDTH, EXPERTS = 4, 2


def _layer(qualified: str, *args: Any) -> nn.Module:
    """Make a layer of a model, such as "aria.AriaExperts"."""
    name, _, kind = qualified.partition(".")
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    layer: nn.Module = getattr(module, kind)(*args)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def _config(*experts: str, **more: Any) -> SimpleNamespace:
    """Configuration of experts as wide inside as outside, which do not tell a turned weight."""
    sizes = dict.fromkeys(experts, EXPERTS) | {"hidden_size": WIDTH, "intermediate_size": WIDTH}
    return SimpleNamespace(
        **sizes,
        moe_intermediate_size=WIDTH,
        hidden_act="tanh",
        _experts_implementation="eager",
        **more,
    )


LOCAL = _config("num_local_experts", swiglu_alpha=1.0, swiglu_limit=100.0, num_experts_per_tok=1)
NEMOTRON = _config("n_routed_experts", moe_latent_size=None, mlp_hidden_act="tanh")
LONGCAT = _config("n_routed_experts", zero_expert_num=0, expert_ffn_hidden_size=WIDTH)
DBRX = _config("moe_num_experts", ffn_hidden_size=WIDTH, ffn_act_fn={"name": "tanh"})
GATES = SimpleNamespace(num_attention_heads=2, lru_width=2 * WIDTH)
TOKENS, SEQUENCE = torch.rand(EXPERTS, WIDTH), torch.rand(1, EXPERTS, WIDTH)
ROUTED = TOKENS, torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.4, 0.6], [0.7, 0.3]])

# By name: the arguments of a layer, and the inputs of a forward pass.
LAYERS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "mixtral.MixtralTopKRouter": ((LOCAL,), (TOKENS,)),
    "mixtral.MixtralExperts": ((LOCAL,), ROUTED),
    "nemotron_h.NemotronHExperts": ((NEMOTRON,), ROUTED),
    "gpt_oss.GptOssExperts": ((LOCAL,), ROUTED),
    "aria.AriaExperts": ((_config("moe_num_experts"),), ROUTED),
    "longcat_flash.LongcatFlashExperts": ((LONGCAT,), ROUTED),
    "step3p7.Step3p7Experts": ((LOCAL,), ROUTED),
    "llama4.Llama4TextExperts": ((LOCAL,), (TOKENS,)),
    "inkling.InklingSharedExperts": ((_config("n_shared_experts"),), (TOKENS, torch.eye(2))),
    "dbrx.DbrxExperts": ((DBRX,), (SEQUENCE, *ROUTED[1:])),
    "jetmoe.JetMoeParallelExperts": ((EXPERTS, WIDTH, WIDTH), (TOKENS, [1, 1])),
    "moshi.MoshiFlexibleLinear": ((WIDTH, WIDTH, EXPERTS), (SEQUENCE,)),
    "csm.CsmCodebooksHead": ((WIDTH, 3, WIDTH), (SEQUENCE, torch.arange(1, 3))),
    "convbert.GroupedLinearLayer": ((2 * WIDTH, 2 * WIDTH, 2), (torch.rand(1, 3, 2 * WIDTH),)),
    "recurrent_gemma.RecurrentGemmaRglru": (
        *((GATES,), (torch.rand(1, 3, 2 * WIDTH), torch.arange(3)[None])),
    ),
    "swiftformer.SwiftFormerEfficientAdditiveAttention": (
        *((SimpleNamespace(), WIDTH), (SEQUENCE,)),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_agree_with_a_forward_pass(kind: str) -> None:
    torch.manual_seed(0)
    arguments, inputs = LAYERS[kind]
    layer = _layer(kind, *arguments)
    weights = [n for n, p in layer.named_parameters() if p.ndim > 1 and "bias" not in n]
    assert gcx.torch.check_plan(layer, *inputs) == (tuple(weights), {}, ())


def test_experts_that_do_not_say_their_order_are_unknown() -> None:
    layer = _layer("mixtral.MixtralExperts", LOCAL)
    del layer.is_transposed
    assert {row.reason for row in gcx.torch.plan(layer)} == {
        "unknown: nobody declared MixtralExperts.gate_up_proj",
        "unknown: nobody declared MixtralExperts.down_proj",
    }


# Models that can be made from their default configuration, and the weights in them that are
# centralized in layers of their own. All other weights that are centralized are in those of torch.
OF_TORCH = """
albert bart beit bert blip bloom clip convnext convnextv2 cvt deberta deberta-v2 deit dinov2
distilbert electra falcon gemma gpt_neox levit llama mamba mamba2 mistral opt perceiver phi qwen2
qwen3 reformer roberta rwkv sam seggpt siglip swin swinv2 t5 vit vit_mae vits wav2vec2 whisper
"""
EXPERTS_AND_ROUTER = {
    "Experts.gate_up_proj": "boi", "Experts.down_proj": "boi", "TopKRouter.weight": "oi"
}  # fmt: skip
MODELS: dict[str, dict[str, str]] = {
    **{name: {} for name in OF_TORCH.split()},
    "deepseek_v4": {
        **EXPERTS_AND_ROUTER,
        "HashRouter.weight": "oi",
        "HyperConnection.fn": "oi",
        "HyperHead.hc_fn": "oi",
    },
    "funnel": {"RelMultiheadAttention.r_kernel": "ioo"},
    "gemma3": {"MultiModalProjector.mm_input_projection_weight": "io"},
    "gpt2": {"Conv1D.weight": "io"},
    "ibert": {"QuantLinear.weight": "oi"},
    "qwen3_moe": EXPERTS_AND_ROUTER,
    "qwen3_next": EXPERTS_AND_ROUTER,
    "zamba": {"MambaMixer.x_proj_weight": "boi", "MambaMixer.dt_proj_weight": "boi"},
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
    prefix, *_ = type(model).__name__.partition("Model")
    found = centralized_outside_of_torch(model).items()
    assert {weight.removeprefix(prefix): layout for weight, layout in found} == MODELS[name]
