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
LAYERS: dict[str, tuple[dict[str, object], dict[str, tuple[int, ...]], dict[str, object]]] = {
    "torch_geometric.nn.dense.linear.Linear": ({}, {"weight": (3, 4)}, {"weight": "oi"}),
    "torch_geometric.nn.dense.linear.HeteroLinear": (
        {},
        {"weight": (2, 4, 3), "bias": (2, 3)},
        {"weight": "bio", "bias": "bias"},
    ),
    "torch_geometric.nn.conv.rgcn_conv.RGCNConv": (
        {"num_blocks": None},
        {"weight": (2, 4, 3), "root": (4, 3), "comp": (5, 2)},
        {"weight": "bio", "root": "io", "comp": "coefficients that mix weights or vectors"},
    ),
    "open_clip.model.CLIP": ({}, {"text_projection": (4, 3)}, {"text_projection": "io"}),
    "loralib.layers.Linear": (
        {"fan_in_fan_out": True},
        {"weight": (4, 3), "lora_A": (2, 4), "lora_B": (3, 2)},
        {"weight": "io", "lora_A": "oi", "lora_B": "oi"},
    ),
    "zuko.nn.Linear": ({}, {"weight": (2, 3, 4)}, {"weight": "boi"}),
    "denoising_diffusion_pytorch.karras_unet.Conv2d": (
        {},
        {"weight": (4, 3, 3, 3)},
        {"weight": "o..."},
    ),
    "mine.PatchLayerNorm": ({}, {"g": (1, 4, 1, 1), "b": (1, 4, 1, 1)}, {"g": "norm", "b": "bias"}),
    "mine.Vision": (
        {},
        {"cls_token": (1, 1, 4), "pos_embedding": (1, 5, 4), "mixer": (4, 4)},
        {
            "cls_token": "token: an input of the layers after it",
            "pos_embedding": "position table, or bias of positions",
            "mixer": "unknown: nobody declared Vision.mixer",
        },
    ),
}


@pytest.mark.parametrize("qualified", LAYERS)
def test_layer_by_its_name(qualified: str) -> None:
    attributes, shapes, expected = LAYERS[qualified]
    module, _, name = qualified.rpartition(".")
    layer = type(name, (nn.Module,), {"__module__": module, **attributes})()
    for key, shape in shapes.items():
        layer.register_parameter(key, nn.Parameter(torch.zeros(shape)))
    plan = gcx.torch.plan(nn.Sequential(layer))
    found = {row.name.removeprefix("0."): row for row in plan}
    assert {key: str(row.layout or row.reason) for key, row in found.items()} == expected


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
