"""Trainings with gcx.torch on many processes come to the weights of one, and send no gradient."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gcx
import gcx.torch

import processes
from sharded_training import (
    EVEN,
    UNEVEN,
    Net,
    Weights,
    adamw,
    assert_weights,
    net,
    sgd,
    train,
    whole,
    whole_weights,
)

# A model on several processes, and which part of the data is for this one.
Spread = tuple[nn.Module, int, int]


def alone(hidden: int) -> Spread:
    return net(hidden), 0, 1


def by_data(wrap: Callable[[Net], nn.Module], hidden: int) -> Spread:
    model = wrap(net(hidden))
    return model, distributed.get_rank(), distributed.get_world_size()


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2, as its manual has it: the layers, then the rest."""
    for layer in model.children():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


ddp, fsdp2 = partial(by_data, DistributedDataParallel), partial(by_data, sharded)


def fsdp2_along_fan_in(hidden: int) -> Spread:
    def cut(parameter: nn.Parameter) -> Shard:
        return Shard(min(1, parameter.ndim - 1))

    return by_data(lambda model: sharded(model, shard_placement_fn=cut), hidden)


def fsdp2_offloaded(hidden: int) -> Spread:
    policy = CPUOffloadPolicy(pin_memory=False)
    return by_data(lambda model: sharded(model, offload_policy=policy), hidden)


def hsdp(hidden: int) -> Spread:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    return by_data(lambda model: sharded(model, mesh=mesh), hidden)


def tensor_parallel(hidden: int) -> Spread:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return in_parallel(net(hidden), mesh), 0, 1


def tensor_and_data_parallel(hidden: int) -> Spread:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = sharded(in_parallel(net(hidden), mesh["tensor"]), mesh=mesh["data"])
    return model, mesh["data"].get_local_rank(), 2


def in_parallel(model: Net, mesh: Any) -> Net:
    plan = {"wide": ColwiseParallel(), "head": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


Outcome = tuple[Weights, list[tuple[str, int]]]  # and what a step has sent


def trained(spread: Callable[[int], Spread], hidden: int, where: Any, **zero: Any) -> Outcome:
    """Train on this process."""
    model, part, parts = spread(hidden)
    optimizer = (sgd if where == "gradient" else adamw)(model.parameters(), **zero)
    gcx.torch.centralize(optimizer, model, where=where)
    sent = train(model, optimizer, part, parts)
    return whole_weights(model), sent


# How many means of each weight there are, where a fan-in is cut, as a step adds them up.
CONV, UP, WIDE, HEAD = 6, 6, EVEN, 4
SCHEMES = [
    pytest.param(ddp, 2, EVEN, [], id="DDP"),
    pytest.param(fsdp2, 2, EVEN, [UP], id="FSDP2"),
    pytest.param(fsdp2, 2, UNEVEN, [UP], id="FSDP2-uneven"),
    pytest.param(fsdp2, 4, UNEVEN, [UP], id="FSDP2-uneven-4"),
    pytest.param(fsdp2_along_fan_in, 2, EVEN, [CONV, WIDE, HEAD], id="FSDP2-along-fan-in"),
    pytest.param(fsdp2_offloaded, 2, EVEN, [UP], id="FSDP2-offloaded"),
    pytest.param(hsdp, 4, EVEN, [UP], id="HSDP"),
    pytest.param(tensor_parallel, 2, EVEN, [HEAD], id="TP"),
    pytest.param(tensor_and_data_parallel, 4, EVEN, [UP, HEAD // 2], id="FSDP2-and-TP"),
]


@cache
def expected(hidden: int, where: str) -> Weights:
    """What one process comes to, which another test compares with NumPy."""
    return trained(alone, hidden, where)[0]


@pytest.mark.parametrize(("spread", "world", "hidden", "cut"), SCHEMES)
def test_as_on_one_process(spread: Any, world: int, hidden: int, cut: Any, where: str) -> None:
    for weights, sent in processes.run(world, trained, spread, hidden, where):
        assert_weights(weights, expected(hidden, where))
        assert sent == [("all_reduce", means) for means in cut]


def trained_with_zero(where: Any) -> Outcome:
    from torch.distributed.optim import ZeroRedundancyOptimizer as kind

    of = torch.optim.SGD if where == "gradient" else torch.optim.AdamW
    return trained(ddp, EVEN, where, kind=kind, optimizer_class=of)


def test_zero_redundancy_optimizer(where: str) -> None:
    for weights, sent in processes.run(2, trained_with_zero, where):
        assert_weights(weights, expected(EVEN, where))
        assert {kind for kind, _ in sent} == {"broadcast_"}  # of weights, which one has updated


def trained_in_mixed_precision(is_written_out: bool) -> Outcome:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(net(UNEVEN), mp_policy=policy)
    optimizer = sgd(model.parameters(), decay=0.0)

    def centralize_whole_gradients(*_: Any) -> None:
        grads = {name: whole(p.grad) for name, p in model.named_parameters()}
        gcx.centralize_many(grads, layouts=gcx.torch.plan(model), out=grads)
        for name, p in model.named_parameters():
            p.grad = distribute_tensor(grads[name], p.device_mesh, p.placements)

    if is_written_out:
        optimizer.register_step_pre_hook(centralize_whole_gradients)
    else:
        gcx.torch.centralize(optimizer, model)
    sent = train(model, optimizer, distributed.get_rank(), 2)
    return whole_weights(model), sent


def test_mixed_precision() -> None:
    expected = processes.run(2, trained_in_mixed_precision, True)[0][0]
    for weights, sent in processes.run(2, trained_in_mixed_precision, False):
        assert_weights(weights, expected, atol=1e-6)
        assert sent == [("all_reduce", UP)]


def trained_with_decay_outside(spread: Callable[[int], Spread], hidden: int) -> Weights:
    """With a learning rate in a tensor, by which a tensor spread over processes is multiplied."""
    model, part, parts = spread(hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), weight_decay=0.5)
    gcx.torch.centralize(optimizer, model, where="update", decay="outside")
    train(model, optimizer, part, parts)
    return whole_weights(model)


def resumed(spread: Callable[[int], Spread], hidden: int, is_loaded: bool) -> Weights:
    """Train, and go on with Gradient Centralization, in the same optimizer or from its state."""
    model, part, parts = spread(hidden)
    first = sgd(model.parameters())
    train(model, first, part, parts)
    optimizer, go_on = first, partial(gcx.torch.centralize, first, model)
    if is_loaded:
        optimizer = sgd(model.parameters())
        gcx.torch.centralize(optimizer, model)
        go_on = partial(optimizer.load_state_dict, first.state_dict())
    with pytest.warns(UserWarning, match="momentum of 4 weights"):
        go_on()
    train(model, optimizer, part, parts)
    return whole_weights(model)


FURTHER = [trained_with_decay_outside, *(partial(resumed, is_loaded=k) for k in (False, True))]


@pytest.mark.parametrize("train", FURTHER, ids=["decay outside", "momentum", "momentum loaded"])
@pytest.mark.parametrize(
    ("spread", "hidden"), [(fsdp2, UNEVEN), (fsdp2_along_fan_in, EVEN), (tensor_parallel, EVEN)]
)
def test_further_trainings_as_on_one_process(train: Any, spread: Any, hidden: int) -> None:
    expected = train(alone, hidden)
    for weights in processes.run(2, train, spread, hidden):
        assert_weights(weights, expected)


def attached_late_to_zero() -> tuple[Weights, list[str]]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, part, parts = ddp(EVEN)
    optimizer = sgd(model.parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD)
    train(model, optimizer, part, parts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gcx.torch.centralize(optimizer, model)
    train(model, optimizer, part, parts)
    return whole_weights(model), [str(warning.message) for warning in caught]


def test_momentum_of_a_zero_redundancy_optimizer() -> None:
    """Each process has that of some weights."""
    outcomes = processes.run(2, attached_late_to_zero)
    expected = resumed(alone, EVEN, False)
    for weights, _ in outcomes:
        assert_weights(weights, expected)
    found = [re.search(r"momentum of (\d) weights", " ".join(said)) for _, said in outcomes]
    assert sum(int(match[1]) for match in found if match) == 4
