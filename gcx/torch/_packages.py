"""Rules of layers in other packages, by the names of their classes.

The packages are not imported and need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcx._rules import BIAS, EMBEDDING, NORM, Rule
from gcx.layout import Layout
from gcx.plan import LeaveAlone

# For one shape, or by rank.
_Answer = Layout | str | LeaveAlone
Answer = _Answer | Mapping[int, _Answer] | None

_SCALE = LeaveAlone("scale of a layer, a norm or logits")
_TOKEN = LeaveAlone("token: an input of the layers after it")
_POSITION = LeaveAlone("position table, or bias of positions")
_RECURRENCE = LeaveAlone("decay or mixing of a recurrence, element by element")
_QUANTIZATION = LeaveAlone("scale of a quantized weight")
_LENGTH = LeaveAlone("DoRA: the length of a weight")
_ORTHOGONAL = LeaveAlone("kept orthogonal to other singular vectors")
_SINGULAR_VALUES = LeaveAlone("AdaLoRA: singular values")
_INTERLEAVED = LeaveAlone("factors of several experts, interleaved")
_ATTENTION = LeaveAlone("vector of attention scores")
_BOTH_SIDES = LeaveAlone("used from both sides: no axis is fan-in alone")
_DIRECTIONS = LeaveAlone("rotation: coordinates or directions of it")
_MIXING = LeaveAlone("coefficients that mix weights or vectors")
_PRODUCT = LeaveAlone("factor of a product element by element, or of three factors")
_SPREAD = LeaveAlone("spread of a random weight")
_EDGE = LeaveAlone("of one edge alone: a curve, a scale or a mask")
_DIAGONAL = LeaveAlone("its diagonal may stay zero, and the mean would move it")
_OF_ONE_SIGN = LeaveAlone("enters as its magnitude, so no mean of it is kept")


def _experts(layer: Any) -> Mapping[str, Answer]:
    """Stacks (experts, out, in), or (experts, in, out): which of the two, the layer must say."""
    is_transposed = getattr(layer, "is_transposed", None)
    return {} if is_transposed is None else {"*_proj": "bio" if is_transposed else "boi"}


def _cond_conv(layer: Any) -> Mapping[str, Answer]:
    """Read kernels (out, in / groups, height, width), one flattened kernel a row."""
    groups, outputs = layer.groups, layer.out_channels
    if groups == 1:
        return {"weight": Layout("b(oi...)", o=outputs)}
    return {"weight": Layout("b(boi...)", b=groups, o=outputs // groups)}


def _lily(layer: Any) -> Mapping[str, Answer]:
    """Stacks B (num_B * rank, out), which multiply from the right."""
    stacks = layer.num_B.items()
    return {f"lily_B.{name}.weight": Layout("(bi)o", b=number) for name, number in stacks}


def _lokr(layer: Any) -> Mapping[str, Answer]:
    """Read the parts of a Kronecker product: its rows are made of one row of each."""
    tucker = {f"lokr_w2_?.{name}": _PRODUCT for name in layer.lokr_t2}
    return {**tucker, "lokr_t2.*": _PRODUCT, "lokr_w[12].*": "o...", "lokr_w[12]_[ab].*": "oi"}


def _read(names: Mapping[LeaveAlone, str]) -> Mapping[str, LeaveAlone]:
    return {name: reason for reason, line in names.items() for name in line.split()}


# Names of parameters that mean the same in every package, by their reason.
NAMES_ANYWHERE = _read(
    {
        _POSITION: "*pos_emb* *positional_* *position_embedding* *position_bias* *rel_pos_* "
        "attention_biases",
        _TOKEN: "*_token *_tokens class_embedding mem_kv mem_[kv] null_kv latents slot_embeds",
        BIAS: "bias *_bias *bias_[uv] beta",
        _SCALE: "gamma gamma.* layer_scale* *logit_scale temperature q_scale k_scale *_q_scale "
        "*_k_scale head_scale* scale_shift_table",
        _RECURRENCE: "A_log",
    }
)

# Names that mean the same throughout transformers and timm.
_NAMES = _read(
    {
        _POSITION: "*position* *_pos *_rel emb_rel_[kv] freqs img_temporal_embedding.* "
        "index_kpool_compress_ape relative_attention_bias rpb time_embeddings",
        BIAS: "b[12] translate",
        _TOKEN: "cls_token* segment_token_* type_token_* *_feature_extensor *_query cls_emb "
        "dummy_node latent latents* mask.* mask_emb no_memory_embedding no_object_pointer "
        "occlusion_spatial_embedding_parameter pad_* padding.* probe query text_prompt",
        EMBEDDING: "codevectors label_embeddings_concat level_embed seg_embed",
        _SCALE: "alpha* gain gamma* log_scale scale",
        _RECURRENCE: "D time_mix_*",
    }
)

# By the qualified names of the classes. Globs are as narrow as they can be: a class of the same
# name elsewhere is another class.
PACKAGES: Mapping[str, Rule[Any]] = {
    "transformers.models.*Experts": _experts,
    # (experts * hidden, width), the last of which leads from hidden to width.
    "transformers.models.dbrx.*ExpertGLU": lambda layer: {
        "[vw]1": "oi",
        "w2": Layout("(bi)o", b=layer.moe_num_experts),
    },
    # A (experts * rank, in) and B (out, rank * experts), each row of which is of all experts.
    "peft.tuners.lora.layer.ParamWrapper": lambda layer: (
        {"lora_B.*.weight": _INTERLEAVED} if layer.num_experts > 1 else {}
    ),
    "peft.tuners.lily.layer.*": _lily,
    "peft.tuners.lokr.layer.*": _lokr,
    # The weight may be (in, out), as in GPT-2.
    "loralib.layers.*Linear": lambda layer: {
        "lora_[AB]": "oi",
        **({"weight": "io"} if layer.fan_in_fan_out else {}),
    },
    "timm.layers.cond_conv2d.CondConv2d": _cond_conv,
    # A stack of matrices (in, out), one for each Fourier mode.
    "neuralop.layers.spectral_convolution.SpectralConv": lambda layer: {
        "weight.tensor": _PRODUCT if layer.separable else "io" + "b" * layer.order
    },
    "deepctr_torch.layers.interaction.CrossNet": lambda layer: {
        "kernels": "bio" if layer.parameterization == "vector" else "boi"
    },
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
    "timm.layers.attention2d.MultiQuery*V2": {"q*_proj": "ooi", "o*_proj": "oii", "*_proj": "io"},
    # Matrices that multiply from the right.
    "transformers.models.*AMSoftmaxLoss": {"weight": "io"},
    "transformers.models.*MultiModalProjector": {"mm_input_projection_weight": "io"},
    "transformers.models.omdet_turbo.*LanguageBackbone": {"text_projection": "io"},
    "transformers.models.inkling*RelativeLogits": {"proj": "io"},
    "transformers.models.inkling2*RelativePositionBias": {"proj": "io"},
    "transformers.models.inkling2*ShortConvolution": {"static_weight": "io"},
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
    "peft.tuners.beft.*": {"beft_bias.*": BIAS},
    "peft.tuners.boft.*": {"boft_R.*": _DIRECTIONS, "boft_s.*": _SCALE},
    # A block of circulant matrices: the rows of a block hold the same entries, moved on.
    "peft.tuners.c3a.*": {"c3a_kernel.*": "oii"},
    "peft.tuners.cartridge.*": {"*_embedding": _TOKEN},
    "peft.tuners.deft.*": {"deft_P.*": _BOTH_SIDES, "deft_R.*": "oi"},
    "peft.tuners.delora.*": {"delora_[AB].*": "oi"},
    "peft.tuners.glora.*": {"glora_[AB].*.X[du]": "oi", "glora_[A-E].*.*": BIAS},
    "peft.tuners.gralora.*": {"gralora_[AB].*": "bio"},
    "peft.tuners.hira.*": {"hira_embedding_A.*": EMBEDDING, "hira_*.*": "oi"},
    "peft.tuners.hra.*": {"hra_u.*": _DIRECTIONS},
    "peft.tuners.ia3.layer.*": {"ia3_l.*": _SCALE},
    "peft.tuners.loha.*": {"hada_*.*": _PRODUCT},
    "peft.tuners.lora.dora.*": {"weight": _LENGTH},
    "peft.tuners.lora.layer.Embedding": {"lora_*_A.*": EMBEDDING, "lora_*_B.*": "oi"},
    "peft.tuners.lora.variants.BlockDiagonalLinear": {"weight": "oi"},
    # Blocks that multiply sums of inputs from the right, or a stack of square blocks.
    "peft.tuners.miss.layer.*": {"miss_block.*": {2: "io", 3: _BOTH_SIDES}},
    "peft.tuners.multitask_prompt_tuning.*": {"prefix_task_*": _TOKEN},
    "peft.tuners.oft.*": {"weight": _DIRECTIONS},
    "peft.tuners.osf.*": {"osf_svd_params.*.[UV]_low": _ORTHOGONAL},
    "peft.tuners.poly.*": {"poly_lora_[AB].*": "bbio", "module_logits": _MIXING},
    "peft.tuners.randlora.*": {"randlora_lambda.*": _SCALE, "randlora_gamma.*": _SCALE},
    "peft.tuners.trainable_tokens.*": {"trainable_tokens_delta.*": EMBEDDING},
    "peft.tuners.vblora.*": {"vblora_logits_*.*": _MIXING, "vblora_vector_bank.*": _MIXING},
    # Other packages.
    "axial_positional_embedding.*": {"weights.*": _POSITION},
    "bayesian_torch.layers.*.Linear*": {"mu_weight": "oi", "rho_weight": _SPREAD},
    "bayesian_torch.layers.*.Conv?d*": {"mu_kernel": "o...", "rho_kernel": _SPREAD},
    "blitz.modules.*.BayesianLinear": {"weight_mu": "oi", "weight_sampler.mu": "oi"},
    "blitz.modules.*.BayesianConv*": {"weight_mu": "o...", "weight_sampler.mu": "o..."},
    "blitz.modules.*.BayesianEmbedding": {"weight*mu": EMBEDDING, "weight_sampler.mu": EMBEDDING},
    "blitz.modules.*.Bayesian*": {
        "weight_[ih]h_mu": "io",
        "weight_[ih]h_sampler.mu": "io",
        "*_rho": _SPREAD,
        "*_sampler.rho": _SPREAD,
    },
    "deepctr_torch.layers.interaction.InteractingLayer": {"W_*": "io"},
    "deepctr_torch.layers.interaction.AFMLayer": {"attention_W": "io", "projection_*": "io"},
    "deepctr_torch.layers.interaction.CrossNetMix": {"[CU]_list": "bboi", "V_list": "bbio"},
    "deepctr_torch.layers.sequence.A*GRUCell": {"weight_*": "oi"},
    "denoising_diffusion_pytorch.karras_unet*.Conv*": {"weight": "o..."},
    "denoising_diffusion_pytorch.karras_unet*.Linear": {"weight": "oi"},
    "denoising_diffusion_pytorch.*": {"g": NORM, "weights": _POSITION},
    "e3nn.nn._fc._Layer": {"weight": "io"},
    "gpytorch.variational.*": {"inducing_points": _TOKEN, "chol_variational_covar": _SPREAD},
    # Maps from a stream to its coefficients; there may be a stack of them.
    "hyper_connections.*": {
        "dynamic_alpha_fn": {2: "io", 3: "bio"},
        "dynamic_beta_fn": {1: _MIXING, 2: "io"},
        "static_*": _MIXING,
    },
    "kan.KANLayer.KANLayer": {"*": _EDGE},
    "litgpt.lora.*": {"lora_[AB]": "oi"},
    "litgpt.model.*Router": {"weight": "oi"},
    "loralib.layers.Embedding": {"lora_A": EMBEDDING, "lora_B": "oi"},
    "loralib.layers.Conv*": {"lora_[AB]": _INTERLEAVED},
    "ncps.torch.ltc_cell.LTCCell": {"*": _EDGE},
    "neuralop.layers.skip_connections.SoftGating": {"weight": _SCALE},
    "norse.torch.module.*": {"input_weights": "oi", "recurrent_weights": _DIAGONAL},
    "normflows.flows.mixing.*": {"W": _BOTH_SIDES},
    "open_clip.transformer.Attention": {"in_proj_weight": "oi"},
    "open_clip.*": {"text_projection": "io", "proj": "io", "query": _TOKEN},
    "clip.model.*": {"text_projection": "io", "proj": "io"},
    "product_key_memory.*.PKM": {"keys": "bobi"},
    "rtdl.modules.NumericalFeatureTokenizer": {"weight": EMBEDDING},
    "rtdl_num_embeddings.LinearEmbeddings": {"weight": EMBEDDING},
    "rtdl_num_embeddings._Periodic": {"weight": _SCALE},
    "rtdl_num_embeddings._NLinear": {"weight": "bio"},
    "speechbrain.nnet.attention.*": {"*_proj_weight": "oi"},
    "speechbrain.nnet.hypermixing.*": {"fc[12]_weights": "boi", "fc[12]_biases": BIAS},
    "tab_transformer_pytorch.*": {"shared_category_embed": EMBEDDING},
    "tltorch.utils.parameter_list.FactorList": {"factor_*": _PRODUCT},
    "torch_geometric.nn.dense.linear.Linear": {"weight": "oi"},
    "torch_geometric.nn.dense.linear.HeteroLinear": {"weight": "bio"},
    "torch_geometric.nn.*.antisymmetric_conv.*": {"W": _BOTH_SIDES},
    "torch_geometric.nn.*.arma_conv.*": {"init_weight": "bio", "*weight": "bbio"},
    "torch_geometric.nn.*.dna_conv.Linear": {"weight": "bio"},
    "torch_geometric.nn.*.gcn2_conv.*": {"weight[12]": "io"},
    "torch_geometric.nn.*.gmm_conv.*": {"g": "io", "mu": _POSITION, "sigma": _POSITION},
    "torch_geometric.nn.models.dimenet.InteractionBlock": {"W": "oii"},
    "torch_geometric.nn.*.gated_graph_conv.*": {"weight": "bio"},
    "torch_geometric.nn.*.han_conv.*": {"lin_src.*": _ATTENTION, "lin_dst.*": _ATTENTION},
    # Matrices of relations or of bases, or of the blocks of a relation.
    "torch_geometric.nn.conv.rg[ca][nt]_conv.*Conv": {
        "weight": {3: "bio", 4: "bbio"},
        "basis": "bio",
        "root": "io",
        "[qke]": "io",
        "comp": _MIXING,
        "att": _MIXING,
        "[lb][12]": _SCALE,
    },
    "torch_geometric.*": {"att*": _ATTENTION, "q": _ATTENTION, "p_rel.*": _SCALE},
    "vector_quantize_pytorch.*": {"embed": EMBEDDING},
    "vit_pytorch.*": {"scale": _SCALE, "mix_heads_*": _MIXING, "reattn_weights": _MIXING},
    "zuko.nn.Linear": {"weight": {2: "oi", 3: "boi"}, "bias": BIAS},
    "zuko.nn.MonotonicLinear": {"weight": _OF_ONE_SIGN},
    # Names that mean something else elsewhere.
    "transformers.models.*Norm": {"weight": NORM},
    "transformers.models.*GRN": {"weight": NORM},
    "transformers.models.*PositionEmbedding*": {"embedding": _POSITION, "weights.*": _POSITION},
    "transformers.models.ibert.*QuantEmbedding": {"weight": EMBEDDING},
    "transformers.integrations.*": {"*scale*": _QUANTIZATION},
    "transformers.models.*": _NAMES,
    "timm.*": _NAMES,
    "*Norm": {"g": NORM, "b": BIAS, "gain": NORM, "scale": NORM},
    "*LayerScale": {"scale": _SCALE},
}
