"""What the layers of timm declare, with timm itself."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("torch")
if find_spec("timm") is None:
    pytest.skip("needs timm", allow_module_level=True)

import torch

import gcx.torch
from gcx import Layout

from recipes import CLIPPING, EPS, clip_by_hand, gradient_and_weight, recipe
from timm_models import new_model
from torch_fan_in import (
    assert_fan_in_is_support,
    centralized_outside_of_torch,
    channels,
    declared_layout,
    unknown_in,
)

# One of each family whose layers own parameters. In most of them, the weights that are centralized
# belong to layers of torch.nn.
OF_TORCH = """
beit_base_patch16_224 bat_resnext26ts botnet26t_256 cait_xxs24_224 coat_tiny convit_tiny
convnext_atto crossvit_tiny_240 deit3_small_patch16_224 deit_tiny_distilled_patch16_224
edgenext_xx_small efficientformer_l1 efficientvim_m1 efficientvit_m0 eva02_tiny_patch14_224
fastvit_t8 halonet26t hiera_tiny_224 iformer_t lambda_resnet26t levit_128s maxvit_tiny_tf_224
mixer_s32_224 mobilenetv4_hybrid_medium mvitv2_tiny naflexvit_base_patch16_gap nest_tiny nfnet_l0
pit_ti_224 resmlp_12_224 resnet50 resnetv2_50x1_bit samvit_base_patch16 sequencer2d_s
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_patch16_224
visformer_tiny vit_base_patch16_rope_mixed_224 vit_relpos_small_patch16_224 vit_tiny_patch16_224
volo_d1_224 xcit_nano_12_p16_224
"""
TIMM = {
    **{name: {} for name in OF_TORCH.split()},
    "swiftformer_xs": {"EfficientAdditiveAttention.w_g": "io"},
    "tf_efficientnet_cc_b0_4e": {"CondConv2d.weight": "b(oi...)"},
}


@pytest.mark.parametrize("name", TIMM)
def test_nothing_is_unknown_in_a_model_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = new_model(name)
    assert unknown_in(model) == []
    assert centralized_outside_of_torch(model) == TIMM[name]


@pytest.mark.parametrize(
    "name", ["levit_128s", "edgenext_xx_small", "swin_tiny_patch4_window7_224"]
)
def test_plan_of_timm_agrees_with_a_forward_pass(name: str) -> None:
    model = new_model(name).eval()
    found = gcx.torch.check_plan(model, torch.rand(1, 3, 224, 224))
    assert len(found.agree) > 50
    assert (found.disagree, found.unseen) == ({}, ())


def test_multi_query_attention_of_timm() -> None:
    kind = import_module("timm.layers.attention2d").MultiQueryAttentionV2
    layer = kind(6, 3, num_heads=2, key_dim=4)
    assert len(gcx.torch.check_plan(layer, torch.rand(2, 6, 3, 3)).agree) == 4


@pytest.mark.parametrize("groups", [1, 2])
def test_mixture_of_kernels_of_timm(groups: int) -> None:
    torch.manual_seed(0)
    kind = import_module("timm.layers.cond_conv2d").CondConv2d
    layer = kind(6, 4, 3, groups=groups, num_experts=2)
    outputs = channels(layer(torch.rand(2, 6, 5, 5), torch.rand(2, 2)))
    assert_fan_in_is_support(layer, outputs, "weight", units_per_output=2)
    matrices = gcx.torch.matrices(layer).split("weight", layer.weight)
    kernels = [part for kernel in layer.weight.view(2, 4, -1) for part in kernel.chunk(groups)]
    assert torch.equal(matrices, torch.stack(kernels))


def test_decoder_of_timm() -> None:
    """It gives each group of classes a matrix (in, out); its forward is not for this torch."""
    decoder = import_module("timm.layers.ml_decoder").MLDecoder(
        num_classes=6, num_of_groups=3, decoder_embedding=8, initial_num_features=4
    )
    assert declared_layout(decoder, "duplicate_pooling") == Layout("bio")


@pytest.mark.parametrize(("letters", "is_right"), [("oiii", True), ("ioii", False), ("bio", False)])
def test_adaptive_clipping_of_timm_takes_all_axes_but_the_first(
    letters: str, is_right: bool
) -> None:
    grad, values = gradient_and_weight(*(4, 6, 3, 3)[: len(letters)])
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.from_numpy(values))
    expected = clip_by_hand(grad, values, letters)
    layer.weight.grad = torch.from_numpy(grad.copy())
    plan = gcx.torch.plan(layer, overrides={"weight": letters})
    recipe("clip_adaptively")(layer, plan, CLIPPING, EPS)
    torch.testing.assert_close(layer.weight.grad, torch.from_numpy(expected))
    layer.weight.grad = torch.from_numpy(grad.copy())
    import_module("timm.utils.agc").adaptive_clip_grad(layer.parameters(), CLIPPING, EPS)
    assert np.allclose(layer.weight.grad, expected) == is_right
