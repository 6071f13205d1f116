"""gcx.transformers in the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gcx.transformers import GradientCentralization

from adapters import ADAM_RATE, MOMENTUM, RATE, STEPS, Kind
from torch_rows import Net, OfTorch

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


class Transformers(OfTorch):
    name = "transformers"
    names: ClassVar = {name: f"net.{in_net}" for name, in_net in OfTorch.names.items()}
    lacks: ClassVar = {"test_copies_are_plain_and_warn": "a callback attaches itself again"}

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        super().__init__(kind, folder, dtype)
        self.model = Model(self.net)
        self.callbacks: list[Any] = []
        self.done = 0

    def attach(self, **options: Any) -> None:
        self.callbacks.append(GradientCentralization(**options))

    def remove(self) -> None:
        self.callbacks.clear()

    def train(self, steps: int = STEPS) -> None:
        """As in one run after another, each from the checkpoint of the one before."""
        checkpoint = f"{self.folder}/checkpoint-{self.done}" if self.done else None
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
        trainer = Trainer(
            self.model, arguments, train_dataset=dataset, callbacks=list(self.callbacks)
        )
        trainer.train(resume_from_checkpoint=checkpoint)

    def resumed(self) -> Transformers:
        other = type(self)(self.kind, self.folder)
        other.callbacks, other.done = self.callbacks, self.done
        return other

    def plan(self) -> Any:
        return self.callbacks[0].plan


ROWS = [Transformers]
