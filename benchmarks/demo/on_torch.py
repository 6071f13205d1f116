"""PyTorch: autograd, `torch.optim.SGD` and `gcx.torch.centralize`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gcx.torch
from benchmarks.demo.problem import Problem
from benchmarks.demo.training import LEARNING_RATE, MOMENTUM

__all__ = ["NETWORKS", "trainer"]

NETWORKS = ("mlp", "cnn")


def trainer(problem: Problem, *, centralize: bool) -> TorchTrainer:
    """See `benchmarks.demo.training.Framework`."""
    model = _mlp() if problem.network == "mlp" else _cnn()
    for name, values in problem.weights.items():
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(torch.tensor(_output_first(values["kernel"])))
        layer.bias = nn.Parameter(torch.tensor(values["bias"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    if centralize:
        gcx.torch.centralize(optimizer, model)
    return TorchTrainer(model, optimizer)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: networks as small as these wait for a second more than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TorchTrainer:
    """A module and its optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer

    @_one_thread()
    def step(self, images: Any, labels: Any, /) -> float:
        """See `benchmarks.demo.training.Trainer`."""
        self._optimizer.zero_grad()
        loss = cross_entropy(self._logits(images), torch.tensor(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()

    @_one_thread()
    @torch.no_grad()
    def predict(self, images: Any, /) -> Any:
        """See `benchmarks.demo.training.Trainer`."""
        return self._logits(images).argmax(1).numpy()

    def kernels(self) -> list[Any]:
        """See `benchmarks.demo.training.Trainer`."""
        weights = [weight for weight in self._model.parameters() if weight.ndim > 1]
        return [_output_last(weight.detach().numpy()) for weight in weights]

    def _logits(self, images: Any) -> Tensor:
        logits: Tensor = self._model(torch.tensor(images[:, None]))  # one channel
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flat=nn.Flatten(),
            hidden=nn.Linear(64, 32),
            rectifier=nn.ReLU(),
            output=nn.Linear(32, 10),
        )
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(1, 16, 3, padding=1),
            rectifier=nn.ReLU(),
            second=nn.Conv2d(16, 32, 3, padding=1, stride=2),
            another_rectifier=nn.ReLU(),
            mean=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            output=nn.Linear(32, 10),
        )
    )


def _output_first(kernel: Any) -> Any:
    """From (in, out) to (out, in), from (height, width, in, out) to (out, in, height, width)."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _output_last(weight: Any) -> Any:
    return np.moveaxis(weight, (0, 1), (-1, -2))
