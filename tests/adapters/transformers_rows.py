"""gcx.transformers under the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gcx.transformers import GradientCentralization

from adapter import ADAM_RATE, MOMENTUM, RATE, STEPS, Kind
from torch_rows import Net, OfTrainer

OPTIMIZERS: dict[Kind, dict[str, Any]] = {
    "sgd": {"optim": "sgd", "optim_args": f"momentum={MOMENTUM}", "learning_rate": RATE},
    "adam": {"optim": "adamw_torch", "learning_rate": ADAM_RATE},
}


class Model(nn.Module):
    """Takes a sample of which it makes nothing: the network has the data."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net.loss()}


class Transformers(OfTrainer):
    name = "transformers"
    callback = GradientCentralization

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        super().__init__(kind, folder, dtype)
        self.model = Model(self.net)

    def train(self, steps: int = STEPS) -> None:
        self.done += steps
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            **OPTIMIZERS[self.kind],
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_strategy="no",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            max_steps=self.done,
            report_to=[],
            save_steps=self.done,
            use_cpu=True,
        )
        dataset = [{"sample": torch.zeros(1)}]
        callbacks = list(self.callbacks)
        trainer = Trainer(self.model, arguments, train_dataset=dataset, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=self.checkpoint)
        self.checkpoint = f"{self.folder}/checkpoint-{self.done}"

    def plan(self) -> Any:
        return self.callbacks[0].plan


ROWS = [Transformers]
