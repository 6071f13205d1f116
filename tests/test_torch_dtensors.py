"""Public functions on tensors that are spread over processes, however they are cut."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gcx
import gcx.diagnostics
import gcx.torch
from gcx import Layout

import processes
from sharded_training import EVEN, Sent, backward, net, sgd

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


@pytest.mark.parametrize(
    "task", [by_the_core, reproducibly, differentiated, compiled, measured, refused_under_fsdp1]
)
def test_public_functions(task: Any) -> None:
    processes.run(2, task)
