"""gcx.lightning in real trainings: the means of the weights stay put, whatever the trainer does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("lightning")

import lightning
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

import gcx.torch
from gcx.lightning import GradientCentralization
from gcx.testing import assert_centralized

# Lightning asks torch for what torch has deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

# Four batches of eight images; a tensor is a data loader as good as any.
BATCHES = torch.rand(4, 8, 1, 6, 6, generator=torch.Generator().manual_seed(1))

Weights = dict[str, Tensor]


class Net(lightning.LightningModule):
    """Regresses to 1, by SGD with momentum and weight decay unless another optimizer is given."""

    def __init__(self, optimizer: Any = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, 3)
        self.trained: nn.Module = nn.ModuleList([self.backbone, self.head])
        usual = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
        self.optimizer = lambda p: optimizer(p, **(options or usual))

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.backbone(batch))

    def training_step(self, batch: Tensor) -> Tensor:
        return (self(batch) - 1).square().mean()

    def test_step(self, batch: Tensor) -> None:
        self(batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.trained.parameters())

    def weights(self) -> Weights:
        return {n: p.detach().clone() for n, p in self.named_parameters() if p.ndim > 1}


QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
USUAL: dict[str, Any] = {**QUIET, "accelerator": "cpu", "max_epochs": 2}


def trainer_of(folder: Path, *callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    options = {**USUAL, "enable_model_summary": False, **options}
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)


def assert_means_stay(net: Net, start: Weights) -> None:
    assert len(start) == 2
    for name, weight in net.weights().items():
        assert_centralized(weight, start=start[name])


def fit(trainer: lightning.Trainer, net: Net, **options: Any) -> Weights:
    """Train; return the weights from before."""
    start = net.weights()
    trainer.fit(net, BATCHES, **options)
    return start


# What the trainer does around the step, and other callbacks that touch weights or optimizers

SCALER = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # with which no step is left out
TRAINERS: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulation": lambda: {"accumulate_grad_batches": 2},
    "clipping by norm": lambda: {"gradient_clip_val": 0.1},
    "clipping by value": lambda: {
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
    },
    "bf16": lambda: {"precision": "bf16-mixed"},
    "gradient scaler": lambda: {
        "plugins": [MixedPrecision("16-mixed", "cpu", SCALER)],
        "gradient_clip_val": 0.1,
    },
    "SWA": lambda: {"callbacks": [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]},
    "EMA": lambda: {"callbacks": [EMAWeightAveraging(decay=0.5)]},
    "learning rate finder": lambda: {
        "callbacks": [LearningRateFinder(attr_name="rate", num_training_steps=20)]
    },
}


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("is_first", [True, False])
def test_means_stay(options: Any, is_first: bool, tmp_path: Path) -> None:
    net, options = Net(), options()
    net.rate = 0.01
    callbacks = [GradientCentralization(), *options.pop("callbacks", [])]
    start = fit(trainer_of(tmp_path, *callbacks[:: 1 if is_first else -1], **options), net)
    assert_means_stay(net, start)
    assert SCALER.get_scale() == 2.0**8


@pytest.mark.parametrize("clips_what_is_left", [False, True])
def test_clipping_comes_before_unless_the_module_centralizes(
    clips_what_is_left: bool, tmp_path: Path
) -> None:
    """As the documentation has it."""

    class Clipped(Net):
        def on_before_optimizer_step(self, _: Any) -> None:
            if clips_what_is_left:
                gcx.torch.centralize_grads_(self)

    net = Clipped(lr=0.01, momentum=0.9)  # without weight decay, which the step adds
    callback, clipping = GradientCentralization(), {"gradient_clip_val": 0.1, "max_steps": 1}
    start = fit(trainer_of(tmp_path, callback, **clipping), net)
    norm = nn.utils.get_total_norm(p.grad for p in net.parameters())
    assert norm == pytest.approx(0.1, rel=1e-5) if clips_what_is_left else 0.01 < norm < 0.099
    assert_means_stay(net, start)


def test_weights_that_thaw_later_are_centralized(tmp_path: Path) -> None:
    net, callback = Net(), GradientCentralization()
    net.trained = net.head
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)
    start = fit(trainer_of(tmp_path, thaw, callback), net)
    assert centralized_by(callback) == [["backbone.0.weight", "head.weight"]]
    assert_means_stay(net, start)


# Several optimizers


class Adversaries(Net):
    """Steps by hand, with one optimizer each for the backbone and the head."""

    def __init__(self, **of_backbone: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.of_backbone = of_backbone

    def configure_optimizers(self) -> Any:
        backbone = {"params": self.backbone.parameters(), **self.of_backbone}
        return [torch.optim.SGD([backbone]), torch.optim.SGD(self.head.parameters())]

    def training_step(self, batch: Tensor) -> None:
        for sign, optimizer in zip((1, -1), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(sign * super().training_step(batch))
            optimizer.step()


def centralized_by(callback: GradientCentralization) -> list[list[str]]:
    """Names of the weights that each optimizer centralizes."""
    return [[row.name for row in plan if row.layout] for plan in callback.plans]


@pytest.mark.parametrize("is_on", [True, False])
def test_each_of_several_optimizers_with_something_to_centralize(
    is_on: bool, tmp_path: Path
) -> None:
    net, callback = Adversaries(centralize=is_on), GradientCentralization()
    start = fit(trainer_of(tmp_path, callback), net)
    names = ["backbone.0.weight", "head.weight"] if is_on else ["head.weight"]
    assert centralized_by(callback) == [[name] for name in names]
    for name in names:
        assert_centralized(net.get_parameter(name), start=start[name])


# What the callback says, and when it refuses


def test_it_says_once_what_it_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(trainer_of(tmp_path, GradientCentralization(layers="conv")), Net())
    (said,) = [text for text in caplog.messages if "Centralization" in text]
    assert said == (
        "<GradientCentralization of SGD, where='gradient', "
        "<gcx plan: 1 of 4 parameters centralized>>"
    )


def test_a_trainer_without_an_optimizer_is_refused(tmp_path: Path) -> None:
    class WithoutOptimizers(Net):
        def configure_optimizers(self) -> Any:
            return []

    with pytest.raises(ValueError, match="no optimizer"):
        fit(trainer_of(tmp_path, GradientCentralization()), WithoutOptimizers())


# Beginning, ending, and beginning again


@pytest.mark.parametrize("fails", [False, True])
def test_the_optimizer_is_left_as_it_was(fails: bool, tmp_path: Path) -> None:
    class Failing(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if fails:
                raise InterruptedError

    trainer = trainer_of(tmp_path, GradientCentralization())
    with pytest.raises(InterruptedError) if fails else nullcontext():
        fit(trainer, net := Failing())
    gcx.torch.centralize(trainer.optimizers[0], net)  # refuses one that has it already


def test_testing_and_predicting_need_no_optimizer(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, GradientCentralization())
    trainer.test(Net(), BATCHES, verbose=False)
    trainer.predict(Net(), BATCHES)


# The same package by its older name


@pytest.mark.parametrize("is_alone", [False, True])
def test_it_works_with_the_trainer_of_pytorch_lightning(is_alone: bool) -> None:
    script = """
import sys
sys.modules["lightning"] = None  # as if it were not installed
from gcx.lightning import GradientCentralization
from gcx.testing import assert_centralized
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel
module = BoringModel()
start = module.layer.weight.detach().clone()
callback = GradientCentralization()
Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[callback]).fit(module)
assert_centralized(module.layer.weight, start=start)
"""
    script = script if is_alone else script.replace('sys.modules["lightning"] = None', "")
    subprocess.run([sys.executable, "-c", script], check=True)


class OfCommandLine(Net):
    """Takes its optimizer from the command line."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__(optimizer)
        self.optimizer = optimizer


def test_means_stay_with_the_configuration_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trainer makes the optimizer itself, of a given class."""
    pytest.importorskip("jsonargparse")
    page = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text(encoding="utf-8")
    _, _, block = page.partition("```yaml\n")
    config = tmp_path / "config.yaml"
    config.write_text(block.partition("```")[0], encoding="utf-8")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's calls
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    cli = LightningCLI(
        OfCommandLine,
        run=False,
        seed_everything_default=0,
        save_config_callback=None,
        trainer_defaults={**USUAL, "default_root_dir": str(tmp_path)},
    )
    assert_means_stay(cli.model, fit(cli.trainer, cli.model))
    assert isinstance(cli.trainer.optimizers[0], torch.optim.RAdam)
