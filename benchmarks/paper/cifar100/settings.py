"""What the numbers of a run depend on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.paper.cells import BASE, Cell
from benchmarks.paper.cifar100.resnet import RESNET_50

__all__ = ["ARMS", "PAPER", "Scale", "Setting"]

# Which layers an arm centralizes, in gcx.torch.centralize.
ARMS: dict[str, Literal["all", "conv"] | None] = {
    BASE: None,
    "conv only": "conv",
    "gradient": "all",
}


@dataclass(frozen=True)
class Scale:
    """The size of the network and of a batch."""

    blocks: tuple[int, ...]
    width: int
    batch: int


PAPER = Scale(RESNET_50, width=64, batch=128)


@dataclass(frozen=True)
class Setting:
    """One run. Runs that differ in the arm alone have equal initial weights and batches."""

    cell: Cell
    arm: str
    seed: int
    epochs: int
    scale: Scale
    precision: Literal["bfloat16", "float32"]
    data: str  # checksum of the training set

    @property
    def folder(self) -> Path:
        """Where the files of the run are, below that of the study."""
        cell = self.cell
        name = f"{cell.optimizer}-{cell.learning_rate:g}-{cell.weight_decay:g}"
        return Path(name, self.arm.replace(" ", "-"), f"seed-{self.seed}")

    def __str__(self) -> str:
        cell = self.cell
        return (
            f"{cell.optimizer}, learning rate {cell.learning_rate:g}, "
            f"weight decay {cell.weight_decay:g}, {self.arm}, seed {self.seed}"
        )
