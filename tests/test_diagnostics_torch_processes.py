"""`gcx.diagnostics` on several processes: models are refused, sharded gradients are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gcx.diagnostics
from gcx.diagnostics.torch import energy_removed

import processes
import sharded_training


def loss_of_part(model: nn.Module, part: slice) -> Tensor:
    return nn.functional.mse_loss(model(sharded_training.DATA[part]), sharded_training.TARGET[part])


def refused(wrap: Callable[[nn.Module], nn.Module]) -> str:
    try:
        energy_removed(wrap(sharded_training.net(8)), [slice(4)], loss_of_part)
    except RuntimeError as error:
        return str(error)
    return "it was not refused"


def shares_after_backward() -> tuple[list[Any], Any]:
    model = fully_shard(sharded_training.net(8))
    rank = torch.distributed.get_rank()
    loss_of_part(model, slice(4 * rank, 4 * rank + 4)).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(isinstance(grad, DTensor) for grad in grads.values())
    report = gcx.diagnostics.energy_removed([grads], layouts={"up*": "io...", "*": "o..."})
    return list(report.rows), report.total


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_a_model_on_several_processes_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for message in processes.run(2, refused, wrap):
        assert message.startswith("the model is spread over processes")


def test_sharded_gradients_are_measured_as_whole_ones() -> None:
    model = sharded_training.net(8)
    loss_of_part(model, slice(8)).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    expected = gcx.diagnostics.energy_removed([grads], layouts={"up*": "io...", "*": "o..."})
    for rows, total in processes.run(2, shares_after_backward):
        assert total == pytest.approx(expected.total, rel=1e-12)
        for row, wanted in zip(rows, expected.rows, strict=True):
            assert row[:4] == wanted[:4]
            assert row.share == (wanted.share and pytest.approx(wanted.share, rel=1e-12))
