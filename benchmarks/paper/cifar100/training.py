"""One network in training, with the settings of the authors' script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, NamedTuple, Self

import torch
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

import gcx.torch
from benchmarks.paper.cells import Cell
from benchmarks.paper.cifar100.archive import Archive
from benchmarks.paper.cifar100.augmentation import batches, normalized, padded
from benchmarks.paper.cifar100.log import Epoch
from benchmarks.paper.cifar100.resnet import ResNet
from benchmarks.paper.cifar100.settings import ARMS, Setting

__all__ = ["OPTIMIZERS", "Data", "Training"]

OPTIMIZERS: dict[str, Callable[[nn.Module, Cell], Optimizer]] = {
    "SGDM": lambda model, cell: SGD(
        model.parameters(), cell.learning_rate, momentum=0.9, weight_decay=cell.weight_decay
    ),
    "Adam": lambda model, cell: Adam(
        model.parameters(), cell.learning_rate, weight_decay=cell.weight_decay
    ),
}
# The learning rate falls after this part of the epochs, and again after as many: 60 of 200.
_FALL_AFTER, _FALL = 0.3, 0.1


class Data(NamedTuple):
    """The images on a device: bytes, those to train on `padded`."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    @classmethod
    def on(cls, device: torch.device, archive: Archive) -> Self:
        """Put the archive on a device, where it takes 270 MB."""
        images, labels = (torch.from_numpy(x).to(device) for x in archive.train)
        test_images, test_labels = (torch.from_numpy(x).to(device) for x in archive.test)
        return cls(padded(images), labels, test_images, test_labels, archive.classes)


class Training:
    """A run at one point in time."""

    def __init__(self, setting: Setting, data: Data, device: torch.device) -> None:
        self._setting, self._data, self._device = setting, data, device
        model, self._generator = _initial(setting, data.classes)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = OPTIMIZERS[setting.cell.optimizer](self.model, setting.cell)
        layers = ARMS[setting.arm]
        if layers:
            gcx.torch.centralize(self._optimizer, self.model, layers=layers)
        period = max(1, round(_FALL_AFTER * setting.epochs))
        self._schedule = StepLR(self._optimizer, period, _FALL)

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on."""
        states = {name: part.state_dict() for name, part in self._parts.items()}
        return states | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._generator.set_state(state["generator"])

    def epoch(self, number: int, tick: Callable[[], object]) -> Epoch:
        """Train for an epoch and test; `tick` is called after each batch of training."""
        start = perf_counter()
        learning_rate = self._schedule.get_last_lr()[0]
        trained = self._train(tick)
        tested = self.test()
        seconds = perf_counter() - start
        return Epoch(number, seconds, float(learning_rate), *trained, *tested)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw the batches of an epoch."""
        images, labels, *_ = self._data
        return batches(images, labels, self._setting.scale.batch, self._generator)

    def _train(self, tick: Callable[[], object]) -> tuple[float, float]:
        self.model.train()
        score = _Score(self._device)
        for inputs, labels in self.batches():
            score.add(*self.step(inputs, labels), labels)
            tick()
        self._schedule.step()
        return score.loss_and_accuracy()

    def step(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step, and return the loss and the predictions before it."""
        self._optimizer.zero_grad()
        loss, logits = self._forward(inputs, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.detach(), logits.detach()

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Loss and accuracy on the test set."""
        self.model.eval()
        score = _Score(self._device)
        _, _, images, labels, _ = self._data
        size = self._setting.scale.batch
        for start in range(0, len(images), size):
            now = slice(start, start + size)
            score.add(*self._forward(normalized(images[now]), labels[now]), labels[now])
        return score.loss_and_accuracy()

    def _forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # Weights and gradients stay in float32, and bfloat16 has its range: no scaler is needed.
        is_mixed = self._setting.precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_mixed):
            logits = self.model(inputs)
            return nn.functional.cross_entropy(logits, labels), logits


def _initial(setting: Setting, classes: int) -> tuple[nn.Module, Generator]:
    """Draw the weights on the CPU, from the seed; the generator goes on from there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model = ResNet(setting.scale.blocks, setting.scale.width, classes)
        return model, Generator().set_state(torch.get_rng_state())


class _Score:
    """Sums over batches that stay on the device, so that the host need not wait for each."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self._loss += loss * len(labels)
        self._correct += (logits.argmax(1) == labels).sum()
        self._images += len(labels)

    def loss_and_accuracy(self) -> tuple[float, float]:
        """Mean loss, and percent that are right."""
        return self._loss.item() / self._images, 100 * self._correct.item() / self._images
