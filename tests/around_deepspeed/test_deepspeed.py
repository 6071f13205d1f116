"""DeepSpeed ZeRO: an error that says what to do, and what it says does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed

import gcx.torch

import processes
from sharded_training import DATA, STEPS, TARGET, Net, Weights, net, sgd, train, whole_weights

HIDDEN = 7


def engine_of(model: Net, stage: int) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # they would be compiled now, which takes minutes
    optimizer = sgd(model.parameters(), decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": len(DATA) // distributed.get_world_size(),
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    return engine


def trained(stage: int) -> Weights:
    import deepspeed

    model = net(HIDDEN).float()
    gcx.torch.centralize_in_backward(model)
    engine = engine_of(model, stage)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    x, y = DATA[rank::world].float(), TARGET[rank::world].float()
    for _ in range(STEPS):
        engine.backward((engine(x) - y).square().mean())
        engine.step()
    parameters = list(model.parameters()) if stage == 3 else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        return {name: p.detach().double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_centralized_in_backward(stage: int) -> None:
    model = net(HIDDEN)
    gcx.torch.centralize(optimizer := sgd(model.parameters(), decay=0.0), model)
    train(model, optimizer)
    expected = whole_weights(model)
    for weights in processes.run(2, trained, stage):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def errors_after_wrapping(stage: int) -> list[str]:
    engine = engine_of(net(HIDDEN).float(), stage)
    errors = []
    for optimizer in (engine.optimizer, engine.optimizer.optimizer):
        for where in ("gradient", "update"):
            with pytest.raises((TypeError, RuntimeError)) as caught:
                gcx.torch.centralize(optimizer, engine.module, where=where)
            errors.append(str(caught.value))
    return errors


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_flattened_parameters_are_an_error_that_says_what_to_do(stage: int) -> None:
    for errors in processes.run(2, errors_after_wrapping, stage):
        for error in errors:
            assert "gcx.torch.centralize_in_backward(model) before the model is wrapped" in error
