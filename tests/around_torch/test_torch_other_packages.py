"""The plans of models of other packages, each against a forward pass; those that are installed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import gcx.torch
from benchmarks.coverage.more_packages import MORE_PACKAGES, Build
from benchmarks.coverage.packages import PACKAGES, Sample
from benchmarks.coverage.report import main
from benchmarks.coverage.stand_ins import import_package
from gcx import Layout

from torch_fan_in import unknown_in

MODELS: dict[str, Callable[[], Sample]] = {
    **{
        f"{package} {name}": make
        for package, kinds in PACKAGES.items()
        for name, make in kinds.items()
    },
    **{
        f"{package} {build.path}": partial(build.sample, package)
        for package, builds in MORE_PACKAGES.items()
        for build in builds
        if isinstance(build, Build) and build.shapes
    },
}


@pytest.mark.parametrize("case", MODELS)
def test_plan_of_a_package_agrees_with_a_forward_pass(case: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of these packages themselves
        try:
            import_package(case.partition(" ")[0])
        except ImportError as error:
            pytest.skip(str(error))
        model, inputs, keywords = MODELS[case]()
    assert unknown_in(model) == []
    found = gcx.torch.check_plan(model.eval(), *inputs, **keywords)
    assert found.disagree == {}


# Layers by the names of their classes, for the packages that are not installed.
TOKEN, POSITIONS = "token: an input of the layers after it", "position table, or bias of positions"
MIXES = "coefficients that mix weights or vectors"
# By the name of the class: its attributes; the shape of each parameter, and its layout or reason.
LAYERS: dict[str, tuple[dict[str, object], dict[str, tuple[tuple[int, ...], str]]]] = {
    "torch_geometric.nn.dense.linear.Linear": ({}, {"weight": ((3, 4), "oi")}),
    "torch_geometric.nn.dense.linear.HeteroLinear": (
        {},
        {"weight": ((2, 4, 3), "bio"), "bias": ((2, 3), "bias")},
    ),
    "torch_geometric.nn.conv.rgcn_conv.RGCNConv": (
        {"num_blocks": None},
        {"weight": ((2, 4, 3), "bio"), "root": ((4, 3), "io"), "comp": ((5, 2), MIXES)},
    ),
    "open_clip.model.CLIP": ({}, {"text_projection": ((4, 3), "io")}),
    "loralib.layers.Linear": (
        {"fan_in_fan_out": True},
        {"weight": ((4, 3), "io"), "lora_A": ((2, 4), "oi"), "lora_B": ((3, 2), "oi")},
    ),
    "zuko.nn.Linear": ({}, {"weight": ((2, 3, 4), "boi")}),
    "denoising_diffusion_pytorch.karras_unet.Conv2d": ({}, {"weight": ((4, 3, 3, 3), "o...")}),
    "mine.PatchLayerNorm": ({}, {"g": ((1, 4, 1, 1), "norm"), "b": ((1, 4, 1, 1), "bias")}),
    "mine.Vision": (
        {},
        {
            "cls_token": ((1, 1, 4), TOKEN),
            "pos_embedding": ((1, 5, 4), POSITIONS),
            "mixer": ((4, 4), "unknown: nobody declared Vision.mixer"),
        },
    ),
}


@pytest.mark.parametrize("qualified", LAYERS)
def test_layer_by_its_name(qualified: str) -> None:
    attributes, expected = LAYERS[qualified]
    module, _, name = qualified.rpartition(".")
    layer = type(name, (nn.Module,), {"__module__": module, **attributes})()
    for key, (shape, _) in expected.items():
        layer.register_parameter(key, nn.Parameter(torch.zeros(shape)))
    found = gcx.torch.plan(nn.Sequential(layer))
    for key, (_, said) in expected.items():
        assert str(found[f"0.{key}"].layout or found[f"0.{key}"].reason) == said


def test_coverage_report(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert main(["peft", "--limit", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["peft"]
    assert found["models"] == 1
    assert found["unknown"] == {"tensors": 0, "elements": 0}
    assert set(found["tensors"]) == {"centralized"}
    with pytest.raises(SystemExit, match="2"):
        main(["no_such_package"])


def test_kernels_of_experts_are_a_view() -> None:
    cond = type("CondConv2d", (nn.Module,), {"__module__": "timm.layers.cond_conv2d"})()
    cond.out_channels, cond.groups = 4, 1
    cond.weight = nn.Parameter(torch.zeros(3, 4 * 2 * 9))
    assert gcx.torch.plan(cond)["weight"].layout == Layout("b(oi...)", o=4)
    cond.groups = 2
    found = gcx.torch.matrices(cond).split("weight", cond.weight)
    groups = [group for kernel in cond.weight.view(3, 4, 18) for group in kernel.chunk(2)]
    assert torch.equal(found, torch.stack(groups))
