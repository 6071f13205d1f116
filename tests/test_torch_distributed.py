"""gcx.torch on many processes: the weights of one process, and no gradient is sent."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gcx
import gcx.diagnostics
import gcx.torch
from gcx import Layout

import processes
from sharded_training import (
    Net,
    Sent,
    Weights,
    adamw,
    assert_weights,
    backward,
    net,
    sgd,
    train,
    whole,
    whole_weights,
)

EVEN, UNEVEN = 8, 7


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


def refused_under_fsdp1() -> None:
    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(
            net(EVEN), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        told = r"the shapes of the layers are gone.*centralize_in_backward\(model\) before"
        for call in (gcx.torch.centralize_in_backward, gcx.torch.plan):
            with pytest.raises(RuntimeError, match=told):
                call(model)
        for where in ("gradient", "update"):
            with pytest.raises(RuntimeError, match=told):
                gcx.torch.centralize(sgd(model.parameters()), model, where=where)


WEIGHTS = [
    pytest.param((4, 6), Layout("o..."), id="even"),
    pytest.param((5, 7), Layout("o..."), id="uneven"),
    pytest.param((1, 5), Layout("o..."), id="one-row"),
    pytest.param((3, 1, 4), Layout("o..."), id="depthwise"),
    pytest.param((3, 5), Layout("io"), id="input-first"),
    pytest.param((6, 3, 2, 2), Layout("(bi)o...", b=2), id="groups"),
    pytest.param((6, 2, 1, 1), Layout("(bi)o...", b=3), id="groups-pointwise"),
    pytest.param((5, 2, 3), Layout("(bi)o...", b=5), id="groups-of-one"),
]


def holding(weight: Tensor) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    return model


def on_every_placement(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> None:
    """Centralize in backward and in place, however a gradient is cut; compare with its whole."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    full = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    view, fan_in = layout.split(shape)
    means = full.numel() // prod(view[axis] for axis in fan_in)
    expected, overrides = gcx.centralize(full, layout=layout), {"weight": layout}
    model, plain = (holding(distribute_tensor(full, mesh, [Replicate()])) for _ in range(2))
    gcx.torch.centralize_in_backward(model, overrides=overrides)
    for kind in [*map(Shard, range(len(shape))), Replicate(), Partial(), Partial("avg")]:
        part = full / mesh.size() if kind == Partial() else full
        grad = (
            DTensor.from_local(part, mesh, [kind])
            if kind.is_partial()
            else distribute_tensor(full.clone(), mesh, [kind])
        )
        model.weight.grad, plain.weight.grad = None, grad
        calls = [partial(gcx.torch.centralize_grads_, plain, overrides=overrides)]
        if not kind.is_partial():  # autograd adds these up
            calls.append(partial(model.weight.backward, grad.clone()))
        with Sent() as sent:
            for call in calls:
                call()
        for found in (grad, model.weight.grad)[: len(calls)]:
            assert found.placements == (kind,)
            assert found.dtype == dtype
            torch.testing.assert_close(found.full_tensor(), expected)
        assert kind == Partial("avg") or all(size <= means for _, size in sent.messages)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("shape", "layout"), WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_placement(shape: Any, layout: Layout, dtype: Any, world: int) -> None:
    processes.run(world, on_every_placement, shape, layout, dtype)


def by_the_core() -> None:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(15.0).reshape(3, 5) ** 2
    for cut in (Shard(0), Shard(1), Replicate()):
        grad = distribute_tensor(full, mesh, [cut])
        out = distribute_tensor(torch.zeros(3, 5), mesh, [Shard(0)])
        found = gcx.centralize_many({"w": grad, "none": None}, strength=0.5)["w"]
        assert gcx.centralize(grad, strength=0.5, out=out) is out
        for result, placement in ((found, cut), (out, Shard(0))):
            assert result.placements == (placement,)
            torch.testing.assert_close(result.full_tensor(), gcx.centralize(full, strength=0.5))


def reproducibly() -> None:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.randn(6, 5, 4, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    for cut in (Shard(0), Replicate()):
        grad = distribute_tensor(full.clone(), mesh, [cut])
        with Sent() as sent:
            result = gcx.centralize(grad, strength=0.3, reproducible=True)
            assert gcx.centralize_many([grad], out=[grad], strength=0.3, reproducible=True)
        assert not sent.messages
        expected = gcx.centralize(full, strength=0.3, reproducible=True)
        for found in (result, grad):
            assert found.placements == (cut,)
            assert torch.equal(found.full_tensor(), expected)
    # Kept axes after the groups may be cut; a group may not, even where the cut is between two.
    grouped = Layout("(bi)o...", b=2)
    options: dict[str, Any] = {"overrides": {"weight": grouped}, "reproducible": True}
    spread = holding(distribute_tensor(full, mesh, [Shard(1)]))
    gcx.torch.centralize_in_backward(spread, **options)
    spread.weight.backward(spread.weight.detach().clone())
    expected = gcx.centralize(full, layout=grouped, reproducible=True)
    assert torch.equal(spread.weight.grad.full_tensor(), expected)
    for layout, axis in ((grouped, 0), (Layout("o..."), 3)):
        cut_in_units = holding(distribute_tensor(full, mesh, [Shard(axis)]))
        options["overrides"] = {"weight": layout}
        with pytest.raises(TypeError, match=r"reproducible=True needs each fan-in whole"):
            gcx.torch.centralize_in_backward(cut_in_units, **options)

    by_columns = {"layout": "...o", "reproducible": True}
    for cut, options in [
        (Shard(1), {"reproducible": True}),
        (Shard(3), {"reproducible": True}),
        (Shard(0), by_columns),
        (Partial(), by_columns),
    ]:
        grad = DTensor.from_local(full.clone(), mesh, [cut])
        with pytest.raises(TypeError, match=r"reproducible=True needs each fan-in whole"):
            gcx.centralize(grad, out=grad, **options)
        assert torch.equal(grad.to_local(), full)


def differentiated() -> None:
    mesh = init_device_mesh("cpu", (2,))
    full, direction = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.eye(3, 5)
    for cut in (Shard(0), Shard(1)):
        x = distribute_tensor(full, mesh, [cut]).requires_grad_()
        (gcx.centralize(x) * distribute_tensor(direction, mesh, [cut])).sum().backward()
        torch.testing.assert_close(x.grad.full_tensor(), gcx.centralize(direction))


def compiled() -> None:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(15.0).reshape(3, 5) ** 2
    program = torch.compile(gcx.centralize, fullgraph=True, backend="aot_eager")
    for cut in (Shard(0), Shard(1)):
        found = program(distribute_tensor(full, mesh, [cut]))
        assert found.placements == (cut,)
        torch.testing.assert_close(found.full_tensor(), gcx.centralize(full))


def measured() -> None:
    plan, single, sharded = gcx.torch.plan(net(EVEN)), net(EVEN), fully_shard(net(EVEN))
    backward(single)
    backward(sharded, distributed.get_rank(), distributed.get_world_size())
    reports = [
        gcx.diagnostics.energy_removed(
            [{name: p.grad for name, p in model.named_parameters()}], layouts=plan
        )
        for model in (single, sharded)
    ]
    alone, spread = [[*report.shares.values(), report.total] for report in reports]
    assert len(alone) == 5
    for expected, found in zip(alone, spread, strict=True):
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "task", [by_the_core, reproducibly, differentiated, compiled, measured, refused_under_fsdp1]
)
def test_public_functions(task: Any) -> None:
    processes.run(2, task)
