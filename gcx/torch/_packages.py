"""Rules of layers in other packages, by the names of their classes.

The packages are not imported and need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcx._rules import BIAS, EMBEDDING, NORM, Rule
from gcx.layout import Layout
from gcx.plan import LeaveAlone

Answer = Layout | str | LeaveAlone

_SCALE = LeaveAlone("scale of a layer, a norm or logits")
_TOKEN = LeaveAlone("token: an input of the layers after it")
_POSITION = LeaveAlone("position table, or bias of positions")
_RECURRENCE = LeaveAlone("decay or mixing of a recurrence, element by element")
_QUANTIZATION = LeaveAlone("scale of a quantized weight")
_LENGTH = LeaveAlone("DoRA: the length of a weight")
_SINGULAR_VALUES = LeaveAlone("AdaLoRA: singular values")
_FLATTENED = LeaveAlone("kernels of several experts, flattened")
_INTERLEAVED = LeaveAlone("factors of several experts, interleaved")

# By the qualified names of the classes. Globs are as narrow as they can be: a class of the same
# name elsewhere is another class.
_BY_CLASS: Mapping[str, Mapping[str, Answer]] = {
    # The linear layer of GPT-2, not a convolution.
    "transformers.pytorch_utils.Conv1D": {"weight": "io"},
    "transformers.models.*Router": {"weight": "oi"},
    # Stacks of experts, codebooks or heads.
    "transformers.models.llama4.*Experts": {"*_proj": "bio"},
    "transformers.models.inkling.*SharedExperts": {"*_proj": "boi"},
    "transformers.models.longcat_flash.*Experts": {"*_proj": "boi"},
    "transformers.models.step3p7.*Experts": {"*_proj": "boi"},
    "transformers.models.jetmoe.*ParallelExperts": {"weight": "boi"},
    "transformers.models.*FlexibleLinear": {"weight": "boi"},
    "transformers.models.csm.*CodebooksHead": {"weight": "bio"},
    "transformers.models.convbert.*GroupedLinearLayer": {"weight": "bio"},
    "transformers.models.recurrent_gemma.*Rglru": {"*_gate_weight": "bio"},
    "transformers.models.zamba.*MambaMixer": {"*_proj_weight": "boi"},
    "transformers.models.esmfold2.*ConfidenceHead": {"*_weight": "bio"},
    "timm.layers.ml_decoder.MLDecoder": {"duplicate_pooling": "bio"},
    # Attention: (in, heads, size of a head), and back.
    "transformers.models.xlnet.*RelativeAttention": {"[qkvr]": "ioo", "o": "oii"},
    "transformers.models.funnel.*RelMultiheadAttention": {"r_kernel": "ioo"},
    "timm.layers.attention2d.MultiQueryAttentionV2": {
        "query_proj": "ooi",
        "key_proj": "io",
        "value_proj": "io",
        "out_proj": "oii",
    },
    # Matrices that multiply from the right.
    "transformers.models.*AMSoftmaxLoss": {"weight": "io"},
    "transformers.models.*MultiModalProjector": {"mm_input_projection_weight": "io"},
    "transformers.models.omdet_turbo.*LanguageBackbone": {"text_projection": "io"},
    "transformers.models.inkling*RelativeLogits": {"proj": "io"},
    "transformers.models.inkling2.*ShortConvolution": {"static_weight": "io"},
    "transformers.models.swiftformer.*AdditiveAttention": {"w_g": "io"},
    "transformers.models.mobilebert.*LMPredictionHead": {"dense.weight": "io"},
    "transformers.models.neomme.*ForMaskedLM": {"unembedding_projection.weight": "io"},
    "transformers.models.x_clip.*XCLIPModel": {"prompts_visual_projection": "io"},
    "timm.models.swiftformer.*AdditiveAttention": {"w_g": "io"},
    # Matrices handed to torch.nn.functional.linear.
    "transformers.models.esmfold2.*Parcae": {"input_matrix_continuous": "oi"},
    "transformers.models.*HyperConnection": {"fn": "oi"},
    "transformers.models.*HyperHead": {"hc_fn": "oi"},
    "transformers.models.*Indexer": {"index_kpool_compress_gate": "oi"},
    "transformers.models.ibert.*QuantLinear": {"weight": "oi"},
    # Adapters.
    "peft.tuners.adalora.layer.*": {"lora_[AB].*": "oi", "lora_E.*": _SINGULAR_VALUES},
    "peft.tuners.adaption_prompt.*": {"adaption_prompt": _TOKEN},
    "peft.tuners.ia3.layer.*": {"ia3_l.*": _SCALE},
    "peft.tuners.lora.dora.*": {"weight": _LENGTH},
    "peft.tuners.lora.layer.Embedding": {
        "lora_embedding_A.*": EMBEDDING,
        "lora_embedding_B.*": "oi",
    },
    "peft.tuners.lora.variants.BlockDiagonalLinear": {"weight": "oi"},
    "peft.tuners.multitask_prompt_tuning.*": {"prefix_task_*": _TOKEN},
    "peft.tuners.trainable_tokens.*": {"trainable_tokens_delta.*": EMBEDDING},
    # Names that mean something else elsewhere.
    "transformers.models.*Norm": {"weight": NORM},
    "transformers.models.*GRN": {"weight": NORM},
    "transformers.models.*PositionEmbedding*": {"embedding": _POSITION, "weights.*": _POSITION},
    "transformers.models.ibert.*QuantEmbedding": {"weight": EMBEDDING},
    "transformers.integrations.*": {"*scale*": _QUANTIZATION},
    "timm.layers.cond_conv2d.CondConv2d": {"weight": _FLATTENED},
}

# By the names of the parameters, which mean the same throughout transformers and timm.
_BY_NAME: Mapping[LeaveAlone, tuple[str, ...]] = {
    _POSITION: (
        "*pos_emb*",
        "*position*",
        "*rel_pos_*",
        "*_pos",
        "*_rel",
        "attention_biases",
        "emb_rel_[kv]",
        "freqs",
        "img_temporal_embedding.*",
        "index_kpool_compress_ape",
        "relative_attention_bias",
        "rpb",
        "time_embeddings",
    ),
    BIAS: ("bias", "*_bias", "bias_[uv]", "pos_bias_[uv]", "b[12]", "beta", "translate"),
    _TOKEN: (
        "*_token",
        "*_tokens",
        "cls_token*",
        "segment_token_*",
        "type_token_*",
        "*_feature_extensor",
        "*_query",
        "class_embedding",
        "cls_emb",
        "dummy_node",
        "latent",
        "latents*",
        "mask.*",
        "mask_emb",
        "no_memory_embedding",
        "no_object_pointer",
        "occlusion_spatial_embedding_parameter",
        "pad_*",
        "padding.*",
        "probe",
        "query",
        "text_prompt",
    ),
    EMBEDDING: ("codevectors", "label_embeddings_concat", "level_embed", "seg_embed"),
    _SCALE: (
        "alpha*",
        "gain",
        "gamma*",
        "layer_scale*",
        "log_scale",
        "logit_scale",
        "scale",
        "temperature",
    ),
    _RECURRENCE: ("A_log", "D", "time_mix_*"),
}


def _experts(layer: Any) -> Mapping[str, Answer]:
    """Stacks (experts, out, in), or (experts, in, out): which of the two, the layer must say."""
    is_transposed = getattr(layer, "is_transposed", None)
    return {} if is_transposed is None else {"*_proj": "bio" if is_transposed else "boi"}


def _dbrx_experts(layer: Any) -> Mapping[str, Answer]:
    """Matrices (experts * hidden, width), the last of which leads from hidden to width."""
    return {"[vw]1": "oi", "w2": Layout("(bi)o", b=layer.moe_num_experts)}


def _lora_of_experts(layer: Any) -> Mapping[str, Answer]:
    """Factors A (experts * rank, in) and B (out, rank * experts): a row of B is of all experts."""
    return {"lora_B.*.weight": _INTERLEAVED} if layer.num_experts > 1 else {}


def _lily(layer: Any) -> Mapping[str, Answer]:
    """Stacks B (num_B * rank, out), which multiply from the right."""
    stacks = layer.num_B.items()
    return {f"lily_B.{name}.weight": Layout("(bi)o", b=number) for name, number in stacks}


def _loralib(layer: Any) -> Mapping[str, Answer]:
    """Read a linear layer, which may hold (in, out) as in GPT-2, and its factors."""
    return {"lora_[AB]": "oi", **({"weight": "io"} if layer.fan_in_fan_out else {})}


_NAMES = {name: reason for reason, names in _BY_NAME.items() for name in names}

PACKAGES: Mapping[str, Rule[Any]] = {
    "transformers.models.*Experts": _experts,
    "transformers.models.dbrx.*ExpertGLU": _dbrx_experts,
    "peft.tuners.lora.layer.ParamWrapper": _lora_of_experts,
    "peft.tuners.lily.layer.*": _lily,
    "loralib.layers.*Linear": _loralib,
    **_BY_CLASS,
    "transformers.models.*": _NAMES,
    "timm.*": _NAMES,
}
