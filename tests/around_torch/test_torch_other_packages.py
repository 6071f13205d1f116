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


# What no forward pass tells, by the class of the layer.
NAMED = {
    "mine.Vision": {
        "cls_token": "token: an input of the layers after it",
        "pos_embedding": "position table, or bias of positions",
        "mixer": "unknown: nobody declared Vision.mixer",
    },
    "mine.PatchLayerNorm": {"g": "norm", "b": "bias"},
    "denoising_diffusion_pytorch.karras_unet.Conv2d": {"weight": "o..."},
    "loralib.layers.Linear": {"weight": "io", "lora_A": "oi", "lora_B": "oi"},
    "torch_geometric.nn.conv.rgcn_conv.RGCNConv": {
        "comp": "coefficients that mix weights or vectors"
    },
}


@pytest.mark.parametrize("qualified", NAMED)
def test_names_of_layers_and_parameters(qualified: str) -> None:
    module, _, kind = qualified.rpartition(".")
    options = {"fan_in_fan_out": True, "num_blocks": None}  # which two of them are asked for
    layer = type(kind, (nn.Module,), {"__module__": module, **options})()
    for name in NAMED[qualified]:
        layer.register_parameter(name, nn.Parameter(torch.zeros(4, 3)))
    found = {row.name: str(row.layout or row.reason) for row in gcx.torch.plan(layer)}
    assert found == NAMED[qualified]


def test_coverage_report(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert main(["peft", "--limit", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["peft"]
    assert found["models"] == 1
    assert found["unknown"] == {"tensors": 0, "elements": 0}
    assert set(found["tensors"]) == {"centralized"}
    with pytest.raises(SystemExit, match="2"):
        main(["no_such_package"])
