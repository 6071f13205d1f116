"""gcx.lightning under the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch

from gcx.lightning import GradientCentralization

from adapter import STEPS, Kind
from torch_rows import OfTrainer


class Module(lightning.LightningModule):
    def __init__(self, row: Lightning) -> None:
        super().__init__()
        self.net, self.row = row.net, row

    def configure_optimizers(self) -> Any:
        return self.row.new_optimizer()

    def training_step(self, _: Any) -> Any:
        return self.net.loss()


class Lightning(OfTrainer):
    name = "lightning"
    callback = GradientCentralization

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        super().__init__(kind, folder, dtype)
        self.module = Module(self)

    def train(self, steps: int = STEPS) -> None:
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

    def plan(self) -> Any:
        (plan,) = self.callbacks[0].plans
        return plan


ROWS = [Lightning]
