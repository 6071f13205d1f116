"""gcx.transformers in real trainings: the means of the weights stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import gcx.torch
from gcx.testing import assert_centralized
from gcx.transformers import GradientCentralization

TOKENS = torch.randint(32, (32, 8), generator=torch.Generator().manual_seed(1))

Weights = dict[str, Tensor]


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    tokens = {"vocab_size": 32, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, **tokens))


QUIET = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "report_to": []}
TRAINING = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6, "weight_decay": 0.1}
USUAL: dict[str, Any] = {**QUIET, **TRAINING, "use_cpu": True, "dataloader_pin_memory": False}


def trainer_of(
    folder: Path,
    model: nn.Module,
    *callbacks: Any,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**USUAL, **options}),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def weights_of(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(trainer: Trainer, **options: Any) -> Weights:
    """Train; return the weights from before."""
    start = weights_of(trainer.model)
    trainer.train(**options)
    return start


def assert_means_stay(model: nn.Module, start: Weights) -> None:
    rows = [row for row in gcx.torch.plan(model) if row.layout is not None]
    assert rows
    for row in rows:
        weight = model.get_parameter(row.name)
        assert_centralized(weight, start=start[row.name], layout=row.layout)


# What the Trainer does around the step

TRAININGS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.1},
    "bf16": {"bf16": True},
    "fused": {"optim": "adamw_torch_fused"},
    "Adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_means_stay(options: dict[str, Any], tmp_path: Path) -> None:
    callback = GradientCentralization(where="update" if "optim" in options else "gradient")
    trainer = trainer_of(tmp_path, model := gpt2(), callback, **options)
    assert_means_stay(model, train(trainer))


def test_decay_of_an_optimizer_of_transformers_must_be_told(tmp_path: Path) -> None:
    def trainer(**options: Any) -> Trainer:
        return trainer_of(tmp_path, model, GradientCentralization(**options), optim="adafactor")

    model = gpt2()
    start = weights_of(model)
    with pytest.raises(ValueError, match="does Adafactor add weight_decay"):
        trainer().train()
    torch.testing.assert_close(weights_of(model), start, rtol=0, atol=0)
    trainer(decay="outside").train()


def test_an_optimizer_that_steps_in_backward_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model := gpt2(), GradientCentralization())
    start = weights_of(model)
    trainer.optimizer = LayerWiseDummyOptimizer(lr=0.1)  # as optim="galore_adamw_layerwise" does
    with pytest.raises(RuntimeError, match="not in the model"):
        trainer.train()
    torch.testing.assert_close(weights_of(model), start, rtol=0, atol=0)


# What the callback says


def test_it_says_once_what_it_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = GradientCentralization()
    assert callback.plan is None
    with caplog.at_level("INFO", logger="gcx.transformers"):
        train(trainer_of(tmp_path, gpt2(), callback))
    (said,) = [record for record in caplog.records if record.name == "gcx.transformers"]
    assert said.getMessage() == (
        "<GradientCentralization of SGD, where='gradient', "
        "<gcx plan: 4 of 16 parameters centralized>>"
    )


# Beginning, ending, and beginning again


def test_training_begins_again_after_an_exception(tmp_path: Path) -> None:
    """And the optimizer is left as it was."""

    class Interruption(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise InterruptedError

    model = gpt2()
    callbacks = GradientCentralization(), Interruption
    trainer = trainer_of(tmp_path, model, *callbacks, optim_args="momentum=0.9")
    start = weights_of(model)
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer.remove_callback(Interruption)
    trainer.train()
    assert_means_stay(model, start)
    gcx.torch.centralize(trainer.optimizer, model)  # refuses an optimizer that has it already


def test_a_checkpoint_that_knows_no_switches_leaves_them(tmp_path: Path) -> None:
    """They are those of an optimizer of the user."""

    def new_trainer(*callbacks: GradientCentralization) -> Trainer:
        model = gpt2()
        groups: list[dict[str, Any]] = [{"params": []}, {"params": []}]
        for name, p in model.named_parameters():
            groups[".attn." not in name]["params"].append(p)
        if callbacks:
            groups[0]["centralize"] = False
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        saving = {"save_strategy": "steps", "save_steps": 3}
        return trainer_of(tmp_path, model, *callbacks, optimizer=optimizer, **saving)

    train(new_trainer())
    callback = GradientCentralization()
    with pytest.warns(UserWarning, match="the momentum of"):
        train(new_trainer(callback), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.plan is not None
    off = [row.name for row in callback.plan if row.reason.startswith("switched off")]
    assert off == ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"]
