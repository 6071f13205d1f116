"""Some cells of the study in PyTorch, to show that its results are not those of one library.

A seed gives the initial weights, batches and labels that it gives in JAX, to the last bit. So the
first losses agree up to rounding; training takes rounding apart, and later only the distributions
of the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

import gcx.torch
from benchmarks.paper.cells import BASE, Outcome
from benchmarks.paper.data import Samples
from benchmarks.paper.network import EPSILON, GROUPS, RUNNING, Network, Weights
from benchmarks.paper.tasks import Draw, Task
from benchmarks.paper.training import MOMENTUM, Grid

__all__ = ["ResidualNetwork", "Trained", "outcomes", "train"]

ARMS: dict[str, Callable[[Optimizer, nn.Module], object]] = {
    "gradient": partial(gcx.torch.centralize, where="gradient"),
    "update": partial(gcx.torch.centralize, where="update"),
    "conv only": partial(gcx.torch.centralize, layers="conv"),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGDM": partial(SGD, momentum=MOMENTUM),
    "Adam": Adam,
    "AdamW": AdamW,
}


class Trained(NamedTuple):
    """Loss of each step, accuracy in percent at each checkpoint, and what was learned."""

    loss: list[float]
    accuracy: list[float]
    model: ResidualNetwork


def outcomes(grids: Sequence[Grid], seeds: Sequence[int]) -> list[Outcome]:
    """Train all arms of all cells with all seeds, as `benchmarks.paper.training.outcomes` does."""
    return [
        _outcome(grid, arm, tuple(seeds), index)
        for grid in grids
        for index in range(len(grid.cells))
        for arm in grid.arms
    ]


def _outcome(grid: Grid, arm: str, seeds: tuple[int, ...], index: int) -> Outcome:
    runs = [train(grid, arm, seed, *grid.cells[index]) for seed in seeds]
    return Outcome(
        cell=grid.cell(index),
        arm=arm,
        seeds=seeds,
        accuracy=np.array([run.accuracy for run in runs]),
        loss=np.array([run.loss for run in runs]),
        checkpoints=grid.checkpoints,
    )


def train(grid: Grid, arm: str, seed: int, learning_rate: float, weight_decay: float) -> Trained:
    """One run."""
    if not isinstance(grid.network, Network):
        raise TypeError(grid.network)
    weights, _ = grid.network.start(seed)
    model = ResidualNetwork(grid.network, weights)
    if grid.pretraining is not None:
        optimizer = _optimizer(grid.optimizer, BASE, model, *grid.cells[0])
        _fit(model, optimizer, grid.pretraining, grid.pretraining.draw(seed))
        model.head = _dense(weights["head"])
    optimizer = _optimizer(grid.optimizer, arm, model, learning_rate, weight_decay)
    return _fit(model, optimizer, grid.task, grid.task.draw(seed))


class ResidualNetwork(nn.Module):
    """`benchmarks.paper.network.Network` as a module, for images (n, 1, height, width)."""

    def __init__(self, network: Network, weights: Weights) -> None:
        super().__init__()
        blocks = [value for value in weights.values() if "first" in value]
        self.stem = _convolution(network.norm, weights["stem"], network.stem_stride)
        self.blocks = nn.Sequential(*(_Block(network.norm, block) for block in blocks))
        self.head = _dense(weights["head"])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes)."""
        y: Tensor = self.blocks(relu(self.stem(x)))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, norm: str, weights: Weights) -> None:
        super().__init__()
        shortcut = weights.get("shortcut")
        stride = 2 if shortcut else 1
        self.first = _convolution(norm, weights["first"], stride)
        self.second = _convolution(norm, weights["second"])
        self.shortcut = _convolution(norm, shortcut, stride) if shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.shortcut(x) + self.second(relu(self.first(x))))


class _Affine(nn.Module):
    """What is left of a norm where nothing is normalized."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": partial(nn.BatchNorm2d, eps=EPSILON, momentum=RUNNING),
    "group norm": partial(nn.GroupNorm, GROUPS, eps=EPSILON),
    "no norm": _Affine,
}


def _convolution(norm: str, weights: Weights, stride: int = 1) -> nn.Sequential:
    """Make a convolution with same padding, and its norm."""
    size, _, last, channels = weights["kernel"].shape
    # Without values: those drawn would be thrown away, and be missing from the global generator.
    convolve = nn.Conv2d(last, channels, size, stride, size // 2, bias=False, device="meta")
    normalize = _NORMS[norm](channels)
    convolve.weight = _parameter(weights["kernel"].transpose(3, 2, 0, 1))
    normalize.weight, normalize.bias = _parameter(weights["scale"]), _parameter(weights["bias"])
    return nn.Sequential(convolve, normalize)


def _dense(weights: Weights) -> nn.Linear:
    features, classes = weights["kernel"].shape
    dense = nn.Linear(features, classes, device="meta")
    dense.weight, dense.bias = _parameter(weights["kernel"].T), _parameter(weights["bias"])
    return dense


def _parameter(values: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))  # a copy: training must not change the start


def _optimizer(
    name: str, arm: str, model: nn.Module, learning_rate: float, weight_decay: float
) -> Optimizer:
    made = OPTIMIZERS[name](model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    if arm != BASE:
        ARMS[arm](made, model)
    return made


def _fit(model: ResidualNetwork, optimizer: Optimizer, task: Task, draw: Draw) -> Trained:
    (images, _), test = _tensors(task.train()), _tensors(task.test())
    labels = torch.tensor(draw.labels, dtype=torch.int64)
    schedule = _schedule(optimizer, task.steps)
    losses, accuracies = [], []
    for batches in np.split(draw.batches, task.checkpoints):
        model.train()
        for batch in torch.tensor(batches):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        accuracies.append(_accuracy(model, *test))
    return Trained(losses, accuracies, model)


def _schedule(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Let the learning rate fall tenfold once 30, 60 and 90% of the steps are done."""
    return MultiStepLR(optimizer, [-(-steps * tenths // 10) for tenths in (3, 6, 9)], gamma=0.1)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(labels)


def _tensors(images: Samples) -> tuple[Tensor, Tensor]:
    """Images (n, 1, height, width), and classes."""
    x = torch.tensor(images.x).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(images.y, dtype=torch.int64)
