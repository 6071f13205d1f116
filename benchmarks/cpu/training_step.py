"""What Gradient Centralization adds to a training step of torch, on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import gcx.torch
from benchmarks.throughput.timing import interleaved

__all__ = ["NONE", "TrainingStep", "training_steps"]

BATCH = 32
NONE = "none"
LOOP = "loop of g.sub_(g.mean())"

# The rate is small, since thousands of steps see the same batch.
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "plain SGD": lambda weights: SGD(weights, lr=1e-6),
    "SGD": lambda weights: SGD(weights, lr=1e-6, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda weights: AdamW(weights, lr=1e-6, weight_decay=1e-2),
}


class TrainingStep(NamedTuple):
    """One model with one optimizer; seconds by what centralizes, `NONE` among them."""

    model: str
    optimizer: str
    whole: dict[str, float]  # forward, backward and the step of the optimizer
    last: dict[str, float]  # the step of the optimizer alone

    def ratio(self, name: str) -> float:
        """Time of a whole step over that without centralization."""
        return self.whole[name] / self.whole[NONE]

    def added(self, name: str) -> float:
        """Seconds that centralization adds to the step of the optimizer."""
        return self.last[name] - self.last[NONE]

    def added_over_loop(self, name: str) -> float:
        """Return what centralization adds over what the loop adds, below 1 where it adds less."""
        return self.added(name) / self.added(LOOP)


def training_steps(*, brief: bool = False) -> Iterator[TrainingStep]:
    """Measure both models with both optimizers, or a small one with one of them."""
    torch.set_num_threads(1)
    if brief:
        yield _measured(lambda: images(blocks=1), "SGD", seconds=1)
        return
    yield _measured(linear, "plain SGD", seconds=20)
    for make in (images, text):
        for optimizer in ("SGD", "AdamW"):
            yield _measured(make, optimizer, seconds=20)


def _measured(make: Callable[[], Task], optimizer: str, *, seconds: float) -> TrainingStep:
    task = make()  # one for all: the place of its tensors in memory has an effect of its own
    loops = {
        name: _Loop(task, OPTIMIZERS[optimizer], attach) for name, attach in CENTRALIZATIONS.items()
    }
    whole = interleaved({k: v.whole for k, v in loops.items()}, seconds=seconds, repeats=1)
    last = interleaved({k: v.last for k, v in loops.items()}, seconds=seconds / 4, repeats=10)
    return TrainingStep(task.name, optimizer, whole, last)


class _Loop:
    """A training loop with its own optimizer."""

    def __init__(self, task: Task, make: Callable[[Any], Optimizer], attach: _Attach) -> None:
        self._task = task
        self._optimizer = make(task.model.parameters())
        self._before_step = attach(self._optimizer, task.model)

    def whole(self) -> None:
        _, model, inputs, labels = self._task
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.last()

    def last(self) -> None:
        self._before_step()
        self._optimizer.step()


# Prepares an optimizer, and returns what the loop calls before each step.
_Attach = Callable[[Optimizer, nn.Module], Callable[[], object]]


def _nothing() -> None:
    pass


def _none(_: Optimizer, __: nn.Module) -> Callable[[], object]:
    return _nothing


def _gcx(where: Any) -> _Attach:
    def attach(optimizer: Optimizer, model: nn.Module) -> Callable[[], object]:
        gcx.torch.centralize(optimizer, model, where=where)
        return _nothing

    return attach


def _pytorch_optimizer(_: Optimizer, model: nn.Module) -> Callable[[], object]:
    def centralize_all() -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                centralize_gradient(weight.grad)

    return centralize_all


def _loop(_: Optimizer, model: nn.Module) -> Callable[[], object]:
    weights = [(w, tuple(range(1, w.ndim))) for w in model.parameters() if w.ndim > 1]

    @torch.no_grad()
    def centralize_all() -> None:
        for weight, axes in weights:
            assert weight.grad is not None
            weight.grad.sub_(weight.grad.mean(axes, keepdim=True))

    return centralize_all


CENTRALIZATIONS: dict[str, _Attach] = {
    NONE: _none,
    LOOP: _loop,
    'gcx, where="gradient"': _gcx("gradient"),
    'gcx, where="update"': _gcx("update"),
    "pytorch_optimizer": _pytorch_optimizer,
}


class Task(NamedTuple):
    """A model, and a batch to train it on."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor


def linear() -> Task:
    """Prepare 53 linear layers of width 64, as many weights as a ResNet-50 has convolutions."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(53)])
    return Task("53 linear layers", model, torch.rand(BATCH, 64), torch.randint(64, (BATCH,)))


def images(blocks: int = 3) -> Task:
    """Images of 32x32 and a residual network of 6 * `blocks` + 2 layers."""
    torch.manual_seed(0)
    inputs, labels = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    return Task(f"ResNet-{6 * blocks + 2}", ResidualNetwork(blocks), inputs, labels)


def text() -> Task:
    """Text of 64 tokens and a GPT of 4 blocks of width 128."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
    return Task("GPT", GPT(), tokens[:, :-1], tokens[:, 1:])


class ResidualNetwork(nn.Sequential):
    """The networks of He et al. (2016) for small images."""

    def __init__(self, blocks: int) -> None:
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        super().__init__(
            _convolution(3, 16),
            nn.ReLU(),
            *map(ResidualBlock, [16, *widths], widths),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


class ResidualBlock(nn.Module):
    """Two convolutions, and a way past them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.body = nn.Sequential(
            _convolution(inputs, outputs, stride=stride), nn.ReLU(), _convolution(outputs, outputs)
        )
        past = _convolution(inputs, outputs, size=1, stride=stride)
        self.past = nn.Identity() if stride == 1 else past

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.past(x))


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


VOCABULARY, CONTEXT, WIDTH = 128, 64, 128


class GPT(nn.Module):
    """Predicts each token from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        past = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        logits: Tensor = self.head(self.blocks(x, past, is_causal=True))
        return logits.transpose(1, 2)  # where cross_entropy wants the classes
