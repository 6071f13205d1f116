"""Small models of packages that need not be installed, each with the inputs of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.coverage.stand_ins import import_package

__all__ = ["PACKAGES", "Make", "Sample"]


class Sample(NamedTuple):
    """A model, and the arguments of one forward pass."""

    model: nn.Module
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any] = {}


Make = Callable[[], Sample]

_NODES, _FEATURES, _RELATIONS = 6, 8, 3


def _graph(name: str, *sizes: Any, relations: bool = False, **options: Any) -> Make:
    """Make a layer or a model of torch_geometric for a ring of nodes."""

    def make() -> Sample:
        kind = getattr(import_package("torch_geometric.nn"), name)
        nodes = torch.arange(_NODES)
        edges = torch.stack([nodes, nodes.roll(1)])
        inputs = [torch.rand(_NODES, _FEATURES), edges]
        more = [nodes % _RELATIONS] if relations else []
        return Sample(kind(*sizes, **options), (*inputs, *more))

    return make


def _relational(name: str, **options: Any) -> Make:
    return _graph(name, _FEATURES, 4, _RELATIONS, relations=True, **options)


def _hetero_linear() -> Sample:
    kind = import_package("torch_geometric.nn").HeteroLinear
    return Sample(kind(_FEATURES, 4, 3), (torch.rand(3, _FEATURES), torch.arange(3)))


def _gmm() -> Sample:
    kind = import_package("torch_geometric.nn").GMMConv
    nodes = torch.arange(_NODES)
    edges = torch.stack([nodes, nodes.roll(1)])
    return Sample(
        kind(_FEATURES, 4, 2, 3), (torch.rand(_NODES, _FEATURES), edges, torch.rand(_NODES, 2))
    )


def _clip() -> Sample:
    open_clip = import_package("open_clip")
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=9, vocab_size=50, width=64, heads=2, layers=2)
    inputs = (torch.rand(2, 3, 32, 32), torch.randint(1, 49, (2, 9)))
    return Sample(open_clip.CLIP(16, vision, text), inputs)


def _loralib() -> Sample:
    lora = import_package("loralib")
    layers = [
        lora.Linear(8, 6, r=2),
        lora.Linear(6, 4, fan_in_fan_out=True),
        lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True]),
    ]
    return Sample(_filled(nn.Sequential(*layers)), (torch.rand(2, 8),))


def _filled(model: nn.Module) -> nn.Module:
    """Draw all parameters anew, so that no factor is zero."""
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 1.1)
    return model


_LITGPT = {"n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 50, "block_size": 16}


def _litgpt(module: str, **options: Any) -> Make:
    def make() -> Sample:
        litgpt = import_package(f"litgpt.{module}")
        model = litgpt.GPT(litgpt.Config(**_LITGPT, **options))
        return Sample(_filled(model), (torch.randint(0, 49, (2, 7)),))

    return make


class _Likelihood(nn.Module):
    """A flow, as a function of data and conditions."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> Any:
        return self.flow(condition).log_prob(x)


def _flow(name: str) -> Make:
    def make() -> Sample:
        flow = getattr(import_package("zuko.flows"), name)(3, 2)
        return Sample(_Likelihood(flow), (torch.rand(4, 3), torch.rand(4, 2)))

    return make


def _stacked_linear() -> Sample:
    return Sample(import_package("zuko.nn").Linear(4, 3, stack=2), (torch.rand(5, 2, 4),))


def _made() -> Sample:
    made = import_package("nflows.transforms.made")
    return Sample(made.MADE(4, 8), (torch.rand(5, 4),))


class _SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> Any:
        return self.attention(x, x, x, positions)


def _speech() -> Sample:
    kind = import_package("speechbrain.nnet.attention").RelPosMHAXL
    return Sample(_SelfAttention(kind(8, 2)), (torch.rand(2, 5, 8), torch.rand(1, 9, 8)))


def _hypermixing() -> Sample:
    kind = import_package("speechbrain.nnet.hypermixing").ParallelMLPs
    return Sample(kind(8, 6, num_mlps=2), (torch.rand(2, 5, 8),))


def _denoiser() -> Sample:
    kind = import_package("denoising_diffusion_pytorch").Unet
    return Sample(kind(16, dim_mults=(1, 2)), (torch.rand(1, 3, 16, 16), torch.tensor([3.0])))


def _karras() -> Sample:
    kind = import_package("denoising_diffusion_pytorch.karras_unet").KarrasUnet
    sizes = {"image_size": 16, "dim": 16, "dim_max": 32, "num_downsamples": 1}
    model = kind(**sizes, num_blocks_per_stage=1, attn_dim_head=8, fourier_dim=16)
    return Sample(model, (torch.rand(1, 4, 16, 16),), {"time": torch.tensor([3.0])})


def _vit(module: str, name: str, **options: Any) -> Make:
    def make() -> Sample:
        kind = getattr(import_package(f"vit_pytorch.{module}"), name)
        sizes = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2}
        return Sample(kind(**sizes, heads=2, mlp_dim=32, **options), (torch.rand(1, 3, 32, 32),))

    return make


PACKAGES: Mapping[str, Mapping[str, Make]] = {
    "torch_geometric": {
        **{n: _graph(n, _FEATURES, 16, 2, 4) for n in ("GCN", "GraphSAGE", "GAT", "GIN")},
        "RGCN": _relational("RGCNConv"),
        "RGCN, bases": _relational("RGCNConv", num_bases=2),
        "RGCN, blocks": _relational("RGCNConv", num_blocks=2),
        "RGAT": _relational("RGATConv"),
        "RGAT, bases": _relational("RGATConv", num_bases=2),
        "RGAT, blocks": _relational("RGATConv", num_blocks=2),
        "FiLM": _relational("FiLMConv"),
        "HeteroLinear": _hetero_linear,
        "GMM": _gmm,
        "ARMA": _graph("ARMAConv", _FEATURES, 4, 2, 3),
        "GatedGraph": _graph("GatedGraphConv", _FEATURES, 2),
        "Antisymmetric": _graph("AntiSymmetricConv", _FEATURES),
        **{n: _graph(n, _FEATURES, 4) for n in ("TAGConv", "LEConv", "FeaStConv", "GATv2Conv")},
        "Transformer": _graph("TransformerConv", _FEATURES, 4),
        "SuperGAT": _graph("SuperGATConv", _FEATURES, 4),
        "Cheb": _graph("ChebConv", _FEATURES, 4, 3),
    },
    "open_clip": {"CLIP": _clip},
    "loralib": {"LoRA": _loralib},
    "litgpt": {
        "GPT": _litgpt("model"),
        "mixture of experts": _litgpt(
            "model",
            mlp_class_name="LLaMAMoE",
            n_expert=4,
            n_expert_per_token=2,
            intermediate_size=32,
        ),
        "LoRA": _litgpt("lora", lora_r=2, lora_query=True, lora_value=True, lora_mlp=True),
    },
    "zuko": {
        **{name: _flow(name) for name in ("NSF", "MAF", "UNAF")},
        "stacked Linear": _stacked_linear,
    },
    "nflows": {"MADE": _made},
    "speechbrain": {"RelPosMHAXL": _speech, "ParallelMLPs": _hypermixing},
    "denoising_diffusion_pytorch": {"Unet": _denoiser, "KarrasUnet": _karras},
    "vit_pytorch": {
        "ViT": _vit("vit", "ViT"),
        "CaiT": _vit("cait", "CaiT", cls_depth=1),
        "DeepViT": _vit("deepvit", "DeepViT"),
        "XCiT": _vit("xcit", "XCiT", cls_depth=1, dim_head=16),
    },
}
