"""Models of further packages, each as a class and the arguments that make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.packages import Sample
from benchmarks.coverage.stand_ins import import_package

__all__ = ["MORE_PACKAGES", "Build", "MakeModel"]


@dataclass(frozen=True)
class Build:
    """A class or function of a package, as "module:name" or a name, and its arguments.

    For a forward pass, the shapes of its inputs.
    """

    path: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ()

    def __call__(self, package: str) -> nn.Module:
        """Make the model."""
        module, _, name = self.path.rpartition(":")
        owner = import_package(f"{package}.{module}" if module else package)
        model: nn.Module = attrgetter(name)(owner)(*self.arguments, **self.options)
        return model

    def sample(self, package: str) -> Sample:
        """Make the model, without a weight that is zero, and its inputs."""
        model = self(package)
        for weight in model.parameters():
            if not weight.any():
                nn.init.uniform_(weight)
        return Sample(model, tuple(torch.rand(shape) for shape in self.shapes))

    def on(self, *shapes: tuple[int, ...]) -> Build:
        """Give the inputs their shapes."""
        return replace(self, shapes=shapes)


MakeModel = Callable[[str], nn.Module]


def _build(path: str, *arguments: Any, **options: Any) -> Build:
    return Build(path, arguments, options)


def _same(paths: str, *arguments: Any, **options: Any) -> Iterator[Build]:
    return (Build(path, arguments, options) for path in paths.split())


def _decoder(package: str) -> nn.Module:
    text = import_package(package)
    layers = text.Decoder(dim=32, depth=2, heads=2, rotary_pos_emb=True)
    model: nn.Module = text.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers)
    return model


def _vision(package: str) -> nn.Module:
    images = import_package(package)
    layers = images.Encoder(dim=32, depth=2, heads=2, use_rmsnorm=True)
    model: nn.Module = images.ViTransformerWrapper(image_size=32, patch_size=8, attn_layers=layers)
    return model


def _hyperbolic(package: str) -> nn.Module:
    manifolds = import_package(f"{package}.manifolds.poincare_ball")
    ball = manifolds.PoincareBall(c=manifolds.Curvature())
    model: nn.Module = import_package(f"{package}.nn").HLinear(4, 3, manifold=ball)
    return model


def _mamba(package: str) -> nn.Module:
    mamba = import_package(f"{package}.mamba")
    model: nn.Module = mamba.Mamba(mamba.MambaConfig(d_model=16, n_layers=2))
    return model


def _gaussian_process(package: str) -> nn.Module:
    variational = import_package(f"{package}.variational")
    posterior = variational.CholeskyVariationalDistribution(5)
    model = import_package(f"{package}.models").ApproximateGP(None)
    model.strategy = variational.VariationalStrategy(model, torch.rand(5, 2), posterior)
    return model  # type: ignore[no-any-return]


_TABULAR = {"categories": (4, 3), "num_continuous": 5, "dim": 16, "depth": 2, "heads": 2}
_TEXT = {"num_tokens": 50, "dim": 32, "depth": 2}
_PYTORCHCV = (
    "resnet18 preresnet18 resnext50_32x4d seresnet18 densenet121 mobilenetv2_w1 "
    "mobilenetv3_large_w1 shufflenetv2_w1 efficientnet_b0 squeezenet_v1_1 dpn68 darknet53 "
    "xception inceptionv3 nasnet_4a1056 bninception vgg11 fdmobilenet_w1"
)
_MONAI = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_VOCOS = {"input_channels": 16, "dim": 32, "intermediate_dim": 64, "num_layers": 2}

MORE_PACKAGES: Mapping[str, tuple[MakeModel, ...]] = {
    "diffusers": tuple(
        _same(
            "UNet2DModel UNet2DConditionModel UNet3DConditionModel AutoencoderKL VQModel "
            "ControlNetModel DiTTransformer2DModel PixArtTransformer2DModel SD3Transformer2DModel "
            "FluxTransformer2DModel WanTransformer3DModel LTXVideoTransformer3DModel "
            "SanaTransformer2DModel CogVideoXTransformer3DModel"
        )
    ),
    "segmentation_models_pytorch": tuple(
        _same(
            "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet",
            "tu-resnet18",
            encoder_weights=None,
        )
    ),
    "pytorchcv": tuple(_build("model_provider:get_model", name) for name in _PYTORCHCV.split()),
    "monai": (
        *_same("networks.nets:UNet", **_MONAI, channels=(4, 8), strides=(2,)),
        *_same("networks.nets:AttentionUnet", **_MONAI, channels=(4, 8), strides=(2,)),
        *_same("networks.nets:BasicUNet networks.nets:SegResNet", **_MONAI),
        *_same("networks.nets:SwinUNETR", **_MONAI, feature_size=12),
        *_same("networks.nets:UNETR", **_MONAI, img_size=32),
        *_same("networks.nets:DenseNet121", **_MONAI),
        _build("networks.nets:ViT", 1, (32, 32), (8, 8), spatial_dims=2),
        _build("networks.nets:ViTAutoEnc", 1, (32, 32), (4, 4), spatial_dims=2),
        _build("networks.nets:HighResNet", 2),
        _build("networks.nets:VNet", spatial_dims=2),
    ),
    "x_transformers": (_decoder, _vision),
    "efficientnet_pytorch": (_build("EfficientNet.from_name", "efficientnet-b0"),),
    "encodec": (_build("EncodecModel.encodec_model_24khz", pretrained=False),),
    "vocos": (
        _build("models:VocosBackbone", **_VOCOS),
        _build("models:VocosResNetBackbone", 16, 32, 2),
    ),
    "kornia": (
        _build("feature:DISK"),
        *_same("feature:HardNet feature:SOSNet feature:TFeat", pretrained=False),
        _build("feature:LoFTR", pretrained=None),
    ),
    "conformer": (_build("Conformer", 32, depth=2, dim_head=8, heads=2),),
    "performer_pytorch": (
        _build("PerformerLM", **_TEXT, max_seq_len=32, heads=2, dim_head=8),
        _build("Performer", dim=32, depth=2, heads=2, dim_head=8),
    ),
    "snntorch": (
        _build("RLeaky", 0.5, linear_features=4),
        _build("SLSTM", 4, 3),
        _build("SConv2dLSTM", 2, 3, 3),
        _build("Leaky", 0.5, learn_beta=True),
    ),
    "fairscale": (_build("nn:Top2Gate", 8, 4),),
    "mup": (_build("MuReadout", 8, 4),),
    "sentence_transformers": (
        _build("models:Dense", 8, 4),
        _build("models:CNN", 8, 4),
        _build("models:LSTM", 8, 4),
        _build("models:WeightedLayerPooling", 8),
    ),
    "st_moe_pytorch": (_build("MoE", 16, num_experts=4),),
    "pytorch_tabnet": (_build("tab_network:TabNet", 6, 2, group_attention_matrix=torch.eye(6)),),
    "deepctr_torch": (
        _build("layers:DNN", 12, (8, 4), use_bn=True),
        _build("layers.interaction:CIN", 4, (8, 6)),
        _build("layers.interaction:CrossNet", 12).on((5, 12)),
        _build("layers.interaction:CrossNet", 12, parameterization="matrix").on((5, 12)),
        _build("layers.interaction:CrossNetMix", 12).on((5, 12)),
        _build("layers.interaction:InteractingLayer", 8).on((2, 3, 8)),
        _build("layers.interaction:AFMLayer", 8),
        _build("layers.interaction:BilinearInteraction", 4, 8),
        _build("layers.interaction:SENETLayer", 4),
        _build("layers.sequence:AGRUCell", 4, 3).on((5, 4), (5, 3), (5, 1)),
    ),
    "normflows": (
        _build("nets:MLP", [2, 8, 2]),
        _build("nets:MADE", 4, 8),
        _build("flows:Planar", (4,)),
        _build("flows:Radial", (4,)),
        _build("flows:Invertible1x1Conv", 4),
        _build("flows:AutoregressiveRationalQuadraticSpline", 4, 1, 8),
    ),
    "neuralop": (
        _build("models:FNO", n_modes=(4, 4), in_channels=2, out_channels=1, hidden_channels=8),
    ),
    "e3nn": (
        _build("o3:Linear", "4x0e+2x1o", "3x0e+2x1o"),
        _build("o3:FullyConnectedTensorProduct", "2x0e", "2x0e", "3x0e"),
        _build("nn:FullyConnectedNet", [4, 8, 2]).on((5, 4)),
    ),
    "tltorch": (
        _build("FactorizedLinear", (2, 4), (4, 2), rank=2),
        _build("FactorizedConv", 4, 6, 3, order=2, rank=2),
        _build("TRL", (4, 3), (2,)),
        _build("TCL", (4, 3), (2, 2)),
    ),
    "kan": (_build("KANLayer", 3, 2),),
    "blitz": (
        _build("modules:BayesianLinear", 4, 3).on((5, 4)),
        _build("modules:BayesianConv2d", 2, 3, (3, 3)).on((1, 2, 6, 6)),
        _build("modules:BayesianLSTM", 4, 3).on((2, 5, 4)),
        _build("modules:BayesianEmbedding", 5, 3),
    ),
    "bayesian_torch": (
        _build("layers:LinearReparameterization", 4, 3).on((5, 4)),
        _build("layers:LinearFlipout", 4, 3).on((5, 4)),
        _build("layers:Conv2dReparameterization", 2, 3, 3).on((1, 2, 6, 6)),
        _build("layers:Conv2dFlipout", 2, 3, 3).on((1, 2, 6, 6)),
        _build("layers:LSTMReparameterization", 4, 3),
    ),
    "norse": tuple(
        _build(f"torch.module.{path}RecurrentCell", 4, 3).on((5, 4))
        for path in ("lif:LIF", "lsnn:LSNN", "lif_adex:LIFAdEx")
    ),
    "hypll": (_hyperbolic,),
    "rtdl_num_embeddings": (
        _build("LinearEmbeddings", 4, 3),
        _build("LinearReLUEmbeddings", 4, 3),
        _build("PeriodicEmbeddings", 4, 3, lite=False).on((5, 4)),
        _build("PeriodicEmbeddings", 4, 3, lite=True),
    ),
    "rtdl": (
        _build("MLP.make_baseline", 4, [8], 0.0, 2),
        _build(
            "ResNet.make_baseline",
            d_in=4,
            n_blocks=2,
            d_main=8,
            d_hidden=8,
            dropout_first=0.0,
            dropout_second=0.0,
            d_out=2,
        ),
        _build("FTTransformer.make_default", n_num_features=3, cat_cardinalities=[2, 3], d_out=2),
    ),
    "ncps": (
        _build("torch:CfC", 4, 8),
        _build("torch:LTC", 4, 8),
        _build("torch:CfC", 4, 8, mixed_memory=True),
    ),
    "mambapy": (_mamba,),
    "product_key_memory": (
        _build("PKM", 16, heads=2, num_keys=8, topk=4, dim_head=8).on((2, 5, 16)),
    ),
    "gpytorch": (_gaussian_process,),
    "vector_quantize_pytorch": (
        _build(
            "VectorQuantize", dim=8, codebook_size=16, learnable_codebook=True, ema_update=False
        ),
        _build("SimVQ", dim=8, codebook_size=16),
        _build("FSQ", [4, 4], dim=8),
        _build("ResidualVQ", dim=8, codebook_size=16, num_quantizers=2),
    ),
    "tab_transformer_pytorch": (
        _build("TabTransformer", **_TABULAR, dim_head=8, dim_out=1),
        _build("FTTransformer", **_TABULAR, dim_head=8, dim_out=1),
    ),
    "soft_moe_pytorch": (
        _build("SoftMoE", 16, seq_len=8, num_experts=4),
        _build("DynamicSlotsSoftMoE", 16, num_experts=4),
    ),
    "perceiver_pytorch": (
        _build("Perceiver", num_freq_bands=2, depth=2, max_freq=4.0, latent_dim=16),
        _build("PerceiverIO", depth=2, dim=16, queries_dim=8, latent_dim=16),
    ),
    "reformer_pytorch": (
        _build("ReformerLM", **_TEXT, max_seq_len=64, heads=2, bucket_size=8),
        _build("Reformer", 32, 2, heads=2),
    ),
    "lightly": (
        _build("models.modules:SimCLRProjectionHead", 16, 16, 8),
        _build("models.modules:DINOProjectionHead", 16, 16, 8, 20),
        _build("models.modules:SwaVPrototypes", 8, 5),
    ),
    "colt5_attention": (
        _build("ConditionalRoutedFeedForward", 16, num_heavy_tokens=2),
        _build("ConditionalRoutedAttention", 16, num_heavy_tokens_q=2, num_heavy_tokens_kv=2),
    ),
    "local_attention": (
        _build("LocalTransformer", **_TEXT, max_seq_len=16, local_attn_window_size=4),
    ),
    "hyper_connections": (
        _build("HyperConnections", 4, dim=16, branch=nn.Linear(16, 16)).on((8, 5, 16)),
    ),
    "axial_positional_embedding": (_build("AxialPositionalEmbedding", 16, (4, 4)),),
}
