"""One training on any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import SGD, AdamW, Optimizer

STEPS = 5
DECAY = 0.1
EVEN, UNEVEN = 8, 7
DATA = torch.rand(8, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = torch.rand(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

Weights = dict[str, Tensor]


class Net(nn.Module):
    """Small and smooth; ``hidden`` rows that divide evenly among processes, or do not.

    The groups of `up` end at rows 2 and 4 of 6, which is not where shards end.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.up = nn.ConvTranspose2d(6, 6, 2, groups=3)
        self.wide = nn.Linear(54, hidden)
        self.head = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x).tanh()).tanh().flatten(1)
        return self.head(self.wide(x).tanh())


def net(hidden: int) -> Net:
    torch.manual_seed(0)
    return Net(hidden).double()


def sgd(parameters: Any, kind: Any = SGD, decay: float = DECAY, **options: Any) -> Optimizer:
    return kind(parameters, lr=0.1, momentum=0.9, weight_decay=decay, **options)


def adamw(parameters: Any, kind: Any = AdamW, **options: Any) -> Optimizer:
    return kind(parameters, lr=0.01, weight_decay=DECAY, **options)


def backward(model: nn.Module, part: int = 0, parts: int = 1) -> None:
    """Take the gradients of one of several equal parts of the data."""
    x, y = DATA[part::parts], TARGET[part::parts]
    (model(x) - y).square().mean().backward()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_weights(model: nn.Module) -> Weights:
    """The weights as one process has them, whatever the model was wrapped in."""
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {name: whole(p.detach()).cpu().clone() for name, p in named.items()}


def assert_weights(found: Weights, expected: Weights, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


class Sent(CommDebugMode):
    """What is sent inside: the name of each collective, and the number of elements it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.get_total_counts()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            leaves = torch.utils._pytree.tree_leaves(args)
            size = sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
            self.messages.append((func._overloadpacket.__name__, size))
        return result


def train(
    model: nn.Module, optimizer: Optimizer, part: int = 0, parts: int = 1
) -> list[tuple[str, int]]:
    """Train a model on one of several parts of the data; what a step has sent."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model, part, parts)
        with Sent() as sent:
            optimizer.step()
    return sent.messages
