"""gcx.lightning in the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch

from gcx.lightning import GradientCentralization

from adapters import STEPS, Kind
from torch_rows import OfTorch


class Module(lightning.LightningModule):
    def __init__(self, row: Lightning) -> None:
        super().__init__()
        self.net, self.row = row.net, row

    def configure_optimizers(self) -> Any:
        return self.row.new_optimizer()

    def training_step(self, _: Any) -> Any:
        return self.net.loss()


class Lightning(OfTorch):
    name = "lightning"
    names: ClassVar = {name: f"net.{in_net}" for name, in_net in OfTorch.names.items()}
    lacks: ClassVar = {"test_copies_are_plain_and_warn": "a callback attaches itself again"}

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        super().__init__(kind, folder, dtype)
        self.callbacks: list[Any] = []
        self.module = Module(self)
        self.done, self.checkpoint = 0, None

    def attach(self, **options: Any) -> None:
        self.callbacks.append(GradientCentralization(**options))

    def remove(self) -> None:
        self.callbacks.clear()

    def train(self, steps: int = STEPS) -> None:
        """As in one run after another, each from the checkpoint of the one before."""
        self.done += steps
        trainer = lightning.Trainer(
            accelerator="cpu",
            barebones=True,
            callbacks=list(self.callbacks),
            default_root_dir=self.folder,
            max_epochs=self.done,
        )
        trainer.fit(self.module, torch.zeros(1, 1), ckpt_path=self.checkpoint)
        self.checkpoint = self.folder / f"{self.done}.ckpt"
        trainer.save_checkpoint(self.checkpoint)

    def resumed(self) -> Lightning:
        other = type(self)(self.kind, self.folder / "resumed")
        other.callbacks = self.callbacks
        other.done, other.checkpoint = self.done, self.checkpoint
        return other

    def plan(self) -> Any:
        (plan,) = self.callbacks[0].plans
        return plan


ROWS = [Lightning]
