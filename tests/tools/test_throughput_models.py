"""Models of ``python -m benchmarks throughput``, and the workloads that are made of them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from benchmarks.throughput import models, workload
from benchmarks.throughput.models import MODELS, Model, Weight, llama3, output_first
from benchmarks.throughput.workload import COPY, EXPRESSION, GCX
from gcx import backends
from gcx.__main__ import look_up

from small_models import CHOICES, SMALL, TRANSPOSED


class TestModels:
    """Against the models of torchvision, timm and transformers, as their authors count them."""

    @pytest.mark.parametrize(
        ("model", "parameters", "tensors", "weights", "units"),
        [
            (MODELS["resnet50"], 25_557_032, 161, 54, 27_560),
            (MODELS["vit-b16"], 86_567_656, 152, 50, 84_712),
            (MODELS["gpt2"], 124_439_808, 148, 50, 134_225),
            (MODELS["gpt2-xl"], 1_557_611_200, 580, 194, 742_481),
            (llama3("whole", 32, has_embedding=True), 8_030_261_248, 291, 226, 1_632_768),
        ],
        ids=lambda value: value.title if isinstance(value, Model) else "",
    )
    def test_counts(
        self, model: Model, parameters: int, tensors: int, weights: int, units: int
    ) -> None:
        assert model.parameters == parameters
        assert len(model.weights) + len(model.others) == tensors
        assert len(model.weights) == weights
        assert sum(weight.units for weight in model.weights) == units

    @pytest.mark.parametrize(
        ("name", "fan_ins"),
        [
            ("resnet50", {64, 128, 147, 256, 512, 576, 1024, 1152, 2048, 2304, 4608}),
            ("vit-b16", {768, 3072}),
            ("gpt2", {768, 3072}),
            ("gpt2-xl", {1600, 6400}),
            ("llama3-8b-slice", {4096, 14336}),
        ],
    )
    def test_fan_ins(self, name: str, fan_ins: set[int]) -> None:
        assert {weight.fan_in for weight in MODELS[name].weights} == fan_ins
        assert {weight.fan_in for weight in output_first(MODELS[name]).weights} == fan_ins

    def test_slice_is_a_part_of_the_whole(self) -> None:
        whole, part = llama3("whole", 32, has_embedding=True), MODELS["llama3-8b-slice"]
        assert part.weights[:-1] == whole.weights[: 8 * 7]
        assert part.weights[-1] == whole.weights[-1]

    def test_output_first(self) -> None:
        assert output_first(TRANSPOSED).weights == (Weight((6, 5)), Weight((3, 4)))
        assert output_first(SMALL).weights == SMALL.weights


@pytest.mark.parametrize(("library", "dtype"), CHOICES)
@pytest.mark.parametrize("model", [SMALL, TRANSPOSED], ids=lambda model: model.title)
class TestWorkloads:
    def test_everybody_centralizes(self, library: str, model: Model, dtype: str) -> None:
        rounding = 5e-2 if dtype == "bfloat16" else 1e-6
        found = {
            name: [backends.load(library).to_numpy(grad) for grad in results]
            for name in self.made(library, model, dtype).calls
            if name != COPY
            for results in [self.made(library, model, dtype).calls[name]()]
        }
        assert {GCX, EXPRESSION} <= set(found)
        for results in found.values():
            for grad, expected, weight in zip(results, found[GCX], model.weights, strict=True):
                assert grad.shape == weight.shape
                assert grad.std() > 0.5
                np.testing.assert_allclose(grad.mean(weight.axes), 0, atol=rounding)
                np.testing.assert_allclose(grad, expected, atol=rounding)

    def test_copy_reads_and_writes_every_byte(self, library: str, model: Model, dtype: str) -> None:
        found = self.made(library, model, dtype)
        copied = found.calls[COPY]()
        assert found.copied == 2 * model.elements * models.DTYPES[dtype]
        if copied is not None:  # NumPy says nothing
            assert copied.nbytes * 2 == found.copied

    def test_peers_take_part_only_where_they_know_the_axes(
        self, library: str, model: Model, dtype: str
    ) -> None:
        peers = set(self.made(library, model, dtype).calls) - {COPY, GCX, EXPRESSION}
        of_library = {"jax": {"optax"}, "torch": {"pytorch_optimizer"}, "numpy": set()}[library]
        known = {peer for peer in of_library if find_spec(peer)}
        assert peers == (known if model is SMALL else set())

    def test_on_a_cpu_the_host_has_no_time_of_its_own(
        self, library: str, model: Model, dtype: str
    ) -> None:
        assert self.made(library, model, dtype).host_clock is None

    def made(self, library: str, model: Model, dtype: str) -> Any:
        return workload.load(library).workload(model.weights, dtype, cpu_of(library))


def cpu_of(library: str) -> str:
    return next(d for d in look_up(library).devices if "cpu" in d.lower())
