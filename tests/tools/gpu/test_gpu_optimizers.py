"""Steps of optimizers in the GPU check: their times, and parameters close to those of torch."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import gcx.torch
from benchmarks.gpu import optimizers
from benchmarks.gpu.acceptance import Part, measure
from gcx.backends import _torch
from gcx.torch import _fused

from gpu_standin import PEER, StandIn
from small_models import SMALL, TRANSPOSED
from torch_kernels import Device

ADAMW = {"lr": 2**-10, "betas": (0.875, 0.96875), "eps": 2**-27, "weight_decay": 2**-6}
ALL_MODELS = optimizers._MODELS


def is_of_gcx(step: Any) -> bool:
    return type(getattr(step, "__self__", None)).__module__.startswith("gcx")


class TestOptimizers:
    @pytest.fixture(autouse=True)
    def no_fallbacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take torch's steps on this CPU for the kernels'."""
        monkeypatch.setattr(_torch, "is_for_kernels", lambda _: False)
        for optimizer in (gcx.torch.AdamW, gcx.torch.SGD):
            monkeypatch.setattr(optimizer, "fallbacks", [])

    def test_modules_have_the_shapes(self) -> None:
        module = optimizers.module_of(SMALL, "bfloat16", "cpu")
        shapes = [tuple(parameter.shape) for parameter in module.parameters()]
        assert shapes == [*(weight.shape for weight in SMALL.weights), *SMALL.others]
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert len([row for row in gcx.torch.plan(module) if row.layout]) == len(SMALL.weights)

    def test_columns_are_centralized_as_columns(self) -> None:
        module = optimizers.module_of(TRANSPOSED, "float32", "cpu")
        shapes = [tuple(parameter.shape) for parameter in module.parameters()]
        assert shapes == [weight.shape for weight in TRANSPOSED.weights]
        before = [parameter.detach().clone() for parameter in module.parameters()]
        optimizer = gcx.torch.SGD(module, lr=1.0, overrides=optimizers.layouts_of(module))
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        pairs = zip(module.parameters(), before, TRANSPOSED.weights, strict=True)
        for parameter, was, weight in pairs:
            moved = (parameter.detach() - was).numpy()
            np.testing.assert_allclose(moved.mean(weight.axes), 0, atol=1e-6)
            assert np.abs(moved).max() > 0.1

    def test_both_layouts_of_a_model_are_timed(self) -> None:
        titles = {model.title: model for model in ALL_MODELS}
        layouts = {weight.layout for weight in titles["GPT-2 small"].weights}
        assert layouts == {"o...", "...o"}
        assert {w.layout for w in titles["GPT-2 small, output first"].weights} == {"o..."}

    def test_ratios(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "_clock", lambda step, _: 1.06 if is_of_gcx(step) else 1.0)
        rows = list(optimizers.times(gpu))
        assert [row.value for row in rows] == [1.06] * 4
        assert [row.ok for row in rows] == [False, True, False, True]  # limits 1.05 and 1.08

    def test_step_of_torch_is_no_step_of_gcx(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gcx.torch.AdamW, "fallbacks", ["", "no kernels"])
        for function in (optimizers.times, optimizers.against_peers, optimizers.distances):
            with pytest.raises(RuntimeError, match="torch makes the step: no kernels"):
                list(function(gpu))

    def test_peers(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled: list[Any] = []
        monkeypatch.setattr(torch, "compile", lambda step, **_: compiled.append(step) or step)
        monkeypatch.setattr(gpu, "_clock", lambda step, _: 1.0 if is_of_gcx(step) else 2.0)
        monkeypatch.setitem(sys.modules, PEER, None)
        part = Part("fused step", "optimizers", "against_peers")
        rows, (item,) = measure(gpu, [part])
        assert [row.measured for row in rows] == [0.5, 0.5]
        assert len(compiled) == 1
        assert item.why.startswith("pytorch_optimizer, then torch: ")

    @pytest.mark.parametrize("name", optimizers._PEERS)
    def test_peers_make_a_centralized_step(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if name.startswith("pytorch_optimizer"):
            pytest.importorskip("pytorch_optimizer")
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        mine, module = (optimizers.module_of(SMALL, "float32", "cpu") for _ in range(2))
        gcx.torch.AdamW(mine, **optimizers._ADAMW).step()
        optimizers._PEERS[name](module, SMALL)
        for found, wanted in zip(module.parameters(), mine.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)

    def test_optimizer_without_gc_is_far_off(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without = {
            name: pair._replace(of_gcx=partial(self.without_gc, pair.of_torch))
            for name, pair in optimizers._OPTIMIZERS.items()
        }
        monkeypatch.setattr(optimizers, "_OPTIMIZERS", without)
        assert not any(row.ok for row in optimizers.distances(gpu))

    def without_gc(self, of_torch: Any, module: Any, **_: Any) -> Any:
        optimizer = of_torch(module.parameters())
        optimizer.fallbacks = []
        return optimizer


class TestEmulatedSteps:
    @pytest.fixture(autouse=True)
    def exact_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take powers of two, since torch's step on a CPU would round others differently."""
        options = {"AdamW": ADAMW, "SGD": {"lr": 2**-10, "momentum": 0.875, "nesterov": True}}
        pairs = {
            name: optimizers._Pair(
                partial(getattr(gcx.torch, name), **chosen),
                partial(getattr(torch.optim, name), fused=True, **chosen),
            )
            for name, chosen in options.items()
        }
        monkeypatch.setattr(optimizers, "_OPTIMIZERS", pairs)
        monkeypatch.setattr(optimizers, "_small", lambda: TRANSPOSED)
        monkeypatch.setattr(optimizers, "_STEPS", 6)
        monkeypatch.setattr(_fused, "is_for_kernels", lambda _: True)

    def test_parameters_are_close_to_those_of_torch(self, gpu: StandIn, kernels: Device) -> None:
        assert all(row.ok for row in optimizers.distances(gpu))
        assert {"AdamW", "SgdMomentum"} <= {*kernels.tensors}

    def test_steps_are_those_of_the_kernels(self, gpu: StandIn, kernels: Device) -> None:
        assert len([*optimizers.times(gpu)]) == 4
        assert {"AdamW", "SgdMomentum"} <= {*kernels.tensors}
