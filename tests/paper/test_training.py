"""Short runs in JAX and in PyTorch: that they agree step by step, and that a fault would show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import MultiStepLR

import gcx.torch
from benchmarks.paper import on_torch, training
from benchmarks.paper.cells import BASE, Cell
from benchmarks.paper.network import EPSILON, GROUPS, Network
from benchmarks.paper.training import Grid, optimizer

from reference import fan_in_means
from short_runs import (
    ARMS,
    BEFORE,
    FINE_TUNING,
    NORMS,
    OPTIMIZERS,
    SEED,
    TASK,
    grid,
    in_jax,
    in_torch,
    kept_in_torch,
)

# Of a loss, relative. Without a fault they differ by 5e-6 at most, with one by 1e-4 at least.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For matrices as small as these, more would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distance(of: Grid, arm: str, run: Callable[..., on_torch.Trained] = kept_in_torch) -> float:
    """Largest relative difference of the losses of the two libraries."""
    return float(np.abs(run(of, arm).loss / in_jax(of)[arm].loss - 1).max())


# In JAX


@pytest.mark.parametrize("steps", [180, 24, 12])
def test_the_learning_rate_falls_after_30_60_and_90_percent_of_the_steps(steps):
    rule = optimizer("SGDM", BASE, 2.0, 0.0, steps)
    state, updates = rule.init(np.zeros(2)), []
    for _ in range(steps):
        update, state = rule.update(np.ones(2), state, np.zeros(2))
        updates.append(update[0])
    momentum = (1 - 0.9 ** np.arange(1, steps + 1)) / (1 - 0.9)
    rates = -np.array(updates) / momentum
    done = np.arange(steps) / steps
    falls = sum(np.round(done, 9) >= part for part in (0.3, 0.6, 0.9))
    np.testing.assert_allclose(rates, 2.0 * 0.1**falls, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_sgdm_moves_alike_with_gradient_and_update_centralized(norm):
    runs = in_jax(grid(norm, "SGDM"))
    gradient, update = runs["gradient"], runs["update"]
    np.testing.assert_allclose(gradient.loss, update.loss, rtol=2e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradient.weights, update.weights)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(gradient.loss / runs[BASE].loss - 1).max() > 1e-3


def test_adam_does_not():
    runs = in_jax(grid("group norm", "Adam"))
    assert np.abs(runs["gradient"].loss / runs["update"].loss - 1).max() > 1e-3


@pytest.mark.parametrize(
    ("optimizer", "arm", "where"),
    [
        ("SGDM", BASE, []),
        ("SGDM", "gradient", ["stem", "block", "head"]),
        ("SGDM", "conv only", ["stem", "block"]),
        ("Adam", "gradient", []),
        ("Adam", "update", ["stem", "block", "head"]),
    ],
)
def test_where_the_fan_in_means_stay(optimizer, arm, where):
    of = grid("group norm", optimizer)
    before, after = of.network.start(SEED)[0], in_jax(of)[arm].weights
    kernels = {
        "stem": lambda weights: weights["stem"]["kernel"],
        "block": lambda weights: weights["stage1_block0"]["first"]["kernel"],
        "head": lambda weights: weights["head"]["kernel"],
    }

    def means(kernel):
        return fan_in_means(kernel, tuple(range(kernel.ndim - 1)))

    moved = {
        name: np.abs(means(kernel(after)) - means(kernel(before))).max()
        for name, kernel in kernels.items()
    }
    assert [name for name, distance in moved.items() if distance < 2e-7] == where
    assert all(moved[name] > 1e-5 for name in set(moved) - set(where))


# The libraries agree


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("norm", "optimizer"),  # each norm and each optimizer, as a program takes long to compile
    [("batch norm", "SGDM"), ("group norm", "Adam"), ("no norm", "SGDM")],
)
def test_losses_agree_step_by_step(norm, optimizer, arm):
    assert distance(grid(norm, optimizer), arm) < TOLERANCE


@pytest.mark.parametrize("arm", ["gradient", "update"])
def test_losses_agree_with_decoupled_decay(arm):
    assert distance(grid("no norm", "AdamW", ("gradient", "update")), arm) < TOLERANCE


def test_losses_agree_in_fine_tuning():
    assert distance(FINE_TUNING, "gradient") < TOLERANCE


def test_fine_tuning_has_the_weights_of_before_and_a_head_of_its_own():
    before = replace(FINE_TUNING, task=BEFORE, pretraining=None)
    model = in_torch(before, BASE).model
    (images, _), draw = on_torch._tensors(TASK.train()), TASK.draw(SEED)
    batch = draw.batches[0]

    def loss() -> float:
        return cross_entropy(model(images[batch]), torch.tensor(draw.labels[batch]).long()).item()

    model.train()
    kept = loss()
    model.head = on_torch.ResidualNetwork(before.network, before.network.start(SEED)[0]).head
    first = kept_in_torch(FINE_TUNING, "gradient").loss[0]
    assert loss() == first
    assert abs(first - kept) > 0.1


@pytest.mark.parametrize(("norm", "arm"), [*product(NORMS, [BASE, "gradient"])])
def test_weights_statistics_and_accuracies_agree(norm, arm):
    of = grid(norm, "SGDM")
    run, trained = in_jax(of)[arm], kept_in_torch(of, arm)
    right = np.array(trained.accuracy) * len(of.task.test().y) / 100
    np.testing.assert_allclose(right, run.seen)
    expected = dict(on_torch.ResidualNetwork(of.network, run.weights).named_parameters())
    for name, weight in trained.model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
    norms = [m for m in trained.model.modules() if isinstance(m, nn.BatchNorm2d)]
    names = sorted(run.statistics, key=lambda name: (name != "stem", name))  # as torch has them
    assert len(norms) == len(names) == (6 if norm == "batch norm" else 0)
    for module, name in zip(norms, names, strict=True):
        mean, variance = run.statistics[name]
        np.testing.assert_allclose(module.running_mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(module.running_var, variance, rtol=1e-4)


def test_a_program_gives_each_cell_arm_and_seed_the_run_that_torch_gives_it():
    cells = ((0.05, 0.0), (0.1, 0.05))
    tiny = Grid(TASK, Network("no norm", blocks=0, width=4), "SGDM", cells)
    grids = [tiny, replace(tiny, optimizer="Adam", cells=((0.001, 0.0),), arms=("update",))]
    seeds = (3, 1)
    expected = {(o.cell, o.arm): o for o in training.outcomes(grids, seeds)}
    found = {(o.cell, o.arm): o for o in on_torch.outcomes(grids, seeds)}
    name = "no norm, 0 blocks a stage"
    assert list(found) == [
        *product([Cell("short", name, "SGDM", *cell) for cell in cells], tiny.arms),
        (Cell("short", name, "Adam", 0.001, 0.0), "update"),
    ]
    assert set(found) == set(expected)
    for key, outcome in found.items():
        assert outcome.seeds == expected[key].seeds == seeds
        assert outcome.checkpoints.tolist() == expected[key].checkpoints.tolist() == [3, 6, 9, 12]
        np.testing.assert_allclose(outcome.loss, expected[key].loss, rtol=TOLERANCE)
        np.testing.assert_allclose(outcome.accuracy, expected[key].accuracy, rtol=1e-6)
    losses = [run for outcome in found.values() for run in outcome.loss]
    assert len(np.unique([run[-1].round(4) for run in losses])) == len(losses) == 10


# A fault would show


def centralized(**options: Any) -> tuple[str, Any]:
    return "ARMS", {"gradient": partial(gcx.torch.centralize, **options)}


def group_norm(groups: int, epsilon: float) -> tuple[str, Any]:
    return "_NORMS", {"group norm": partial(nn.GroupNorm, groups, eps=epsilon)}


def a_step_late(optimizer: torch.optim.Optimizer, steps: int) -> MultiStepLR:
    return MultiStepLR(optimizer, [5, 9, 12], gamma=0.1)


def on_its_side(values: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values.swapaxes(-1, -2) if values.ndim == 4 else values))


# What is put in place of what in `on_torch`.
FAULTS = {
    "another axis": centralized(overrides={"*.0.weight": "io..."}),
    "all but the head": centralized(layers="conv"),
    "decay outside": centralized(decay="outside"),
    "no centralization": ("ARMS", {"gradient": lambda *_: None}),
    "schedule": ("_schedule", a_step_late),
    "kernel": ("_parameter", on_its_side),
    "epsilon": group_norm(GROUPS, 100 * EPSILON),
    "groups": group_norm(GROUPS // 2, EPSILON),
    "momentum": ("OPTIMIZERS", {"SGDM": partial(SGD, momentum=0.89), "Adam": AdamW}),
    "nesterov": ("OPTIMIZERS", {"SGDM": partial(SGD, momentum=0.9, nesterov=True)}),
}


@pytest.mark.parametrize(
    ("fault", "optimizer"),
    [pair for pair in product(FAULTS, OPTIMIZERS) if pair != ("nesterov", "Adam")],
)
def test_a_fault_would_show(fault, optimizer, monkeypatch):
    monkeypatch.setattr(on_torch, *FAULTS[fault])
    assert distance(grid("group norm", optimizer), "gradient", in_torch) > TOLERANCE


# Corollary 4.1


# Two roundings of a float32 weight near 1: how a mean comes out depends on the processor.
ROUNDING = 2 * np.finfo(np.float32).eps


@pytest.mark.parametrize("norm", NORMS)
def test_fan_in_means_stay_with_centralization_alone(norm):
    of = grid(norm, "SGDM")
    start = on_torch.ResidualNetwork(of.network, of.network.start(SEED)[0])
    moved = {
        arm: [
            np.abs(_means(after) - _means(before)).max()
            for before, after in zip(start.parameters(), model.parameters(), strict=True)
            if before.ndim > 1
        ]
        for arm, model in ((arm, kept_in_torch(of, arm).model) for arm in ARMS)
    }
    for arm in ("gradient", "update"):
        assert max(moved[arm]) < ROUNDING
    *convolutions, head = moved["conv only"]
    assert max(convolutions) < ROUNDING
    assert min(head, *moved[BASE]) > 1e-4


def _means(weight: torch.Tensor) -> Any:
    return fan_in_means(weight.detach(), tuple(range(1, weight.ndim)))


# What it leaves alone


def test_the_start_and_the_global_generator_stay():
    of = grid("no norm", "SGDM")
    state, (weights, _) = torch.get_rng_state(), of.network.start(SEED)
    model = on_torch.ResidualNetwork(of.network, weights)
    with torch.no_grad():
        model.stem[0].weight.add_(1)
    (again, _) = of.network.start(SEED)
    np.testing.assert_array_equal(weights["stem"]["kernel"], again["stem"]["kernel"])
    in_torch(of, "gradient")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_is_the_same_again():
    first, second = (in_torch(grid("batch norm", "Adam"), "gradient") for _ in range(2))
    assert first[:2] == second[:2]
