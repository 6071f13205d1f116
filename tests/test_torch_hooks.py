"""An optimizer with gcx.torch.centralize: attaching, stepping, leaving, and errors."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import gcx.torch
from gcx.testing import assert_centralized

from torch_training import (
    DECAYED,
    GRAD,
    RTOL,
    Own,
    assert_means_kept,
    attached,
    backward,
    change_of,
    loss_of,
    new_layer,
    train,
)


class Inherited(Adam):
    """Calls the step of its base class, so that the hooks run twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_state_dict_knows_nothing_of_it(where: Any, layer: nn.Linear) -> None:
    twin = copy.deepcopy(layer)
    plain = SGD(twin.parameters(), lr=0.01, momentum=0.9)
    optimizer = attached(layer, where, momentum=0.9)
    train(twin, plain)
    train(layer, optimizer)
    found, expected = optimizer.state_dict(), plain.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"][0].keys() == expected["state"][0].keys()


def test_handle_that_nobody_keeps(layer: nn.Linear) -> None:
    optimizer = attached(nn.Sequential(layer))
    gc.collect()
    assert_means_kept(layer, lambda: train(layer, optimizer))
    with pytest.raises(ValueError, match=r"gcx\.torch\.centralized\(optimizer\)\.remove\(\)"):
        gcx.torch.centralize(optimizer, layer)
    gcx.torch.centralized(optimizer).remove()
    assert gcx.torch.centralized(optimizer) is None
    gcx.torch.centralize(optimizer, layer)


def attached_in_backward(layer: nn.Module) -> SGD:
    gcx.torch.centralize_in_backward(nn.Sequential(layer))
    return SGD(layer.parameters())


ATTACHING = [attached, partial(attached, where="update"), gcx.torch.AdamW, attached_in_backward]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Or it might be the collector of cycles that frees something."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("attach", ATTACHING)
def test_optimizer_and_model_are_freed_at_once(attach: Any) -> None:
    layer = new_layer()
    optimizer = attach(layer)
    train(layer, optimizer)
    alive = ref(layer), ref(optimizer)
    del layer, optimizer
    assert [is_alive() for is_alive in alive] == [None, None]


@pytest.mark.usefixtures("uncollected")
def test_handle_that_is_removed_frees_the_model_at_once(where: Any, layer: nn.Linear) -> None:
    model = nn.Sequential(layer)
    is_alive = ref(model)
    optimizer = attached(model, where)
    train(layer, optimizer)
    gcx.torch.centralized(optimizer).remove()
    del model
    assert is_alive() is None


def test_handle_removed_in_a_closure(where: Any, layer: nn.Linear) -> None:
    """The step under way is already a plain one."""
    twin = copy.deepcopy(layer)
    optimizer, plain = SGD(layer.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    handle = gcx.torch.centralize(optimizer, layer, where=where)

    def closure() -> None:
        loss_of(layer).backward()
        handle.remove()

    optimizer.step(closure)
    train(twin, plain, steps=1)
    assert torch.equal(layer.weight, twin.weight)


class Wrapper(Optimizer):
    """Like Accelerate's: called an optimizer, without being made as one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def test_wrapped_optimizer(layer: nn.Linear) -> None:
    inside = SGD(layer.parameters(), lr=0.1)
    wrapper = Wrapper(Wrapper(inside))
    handle = gcx.torch.centralize(wrapper, layer)
    assert "of SGD" in repr(handle)
    loss_of(layer).backward()
    assert_means_kept(layer, wrapper.step)
    with pytest.raises(ValueError, match="already"):
        gcx.torch.centralize(inside, layer)


def test_copy_of_a_handle_looks_at_the_copy_of_the_model(layer: nn.Linear) -> None:
    """Modules of Lightning hold their optimizer and the handle."""
    model: Any = nn.Sequential(layer)
    model.handle = gcx.torch.centralize(optimizer := SGD(layer.parameters(), momentum=0.9), model)
    model.optimizer = optimizer
    train(model, optimizer)
    with pytest.warns(UserWarning, match="does not centralize"):
        twin = copy.deepcopy(model)
    layer.weight = nn.Parameter(torch.ones(3, 5))
    loss_of(twin).backward()
    twin.handle.centralize_grads_()
    assert_centralized(twin[0].weight.grad, rtol=RTOL)
    twin[0].weight = nn.Parameter(torch.ones(3, 5))
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced"):
        twin.handle.centralize_grads_()


def test_weights_without_a_gradient_are_passed_over(where: Any, layer: nn.Linear) -> None:
    idle = new_layer(1)
    frozen = nn.Linear(5, 5).bfloat16().requires_grad_(requires_grad=False)
    model = nn.ModuleList([layer, idle, frozen])
    decay = "outside" if where == "update" else None
    optimizer = attached(model, where, AdamW, decay, weight_decay=0.1)
    before, version = idle.weight.detach().clone(), frozen.weight._version
    train(layer, optimizer)  # without a warning of bfloat16
    idle.weight.grad = torch.ones_like(idle.weight)
    optimizer.step(partial(backward, layer, optimizer))  # which frees it
    assert torch.equal(idle.weight, before)
    assert frozen.weight._version == version


@pytest.mark.parametrize("step", [0, 1])
def test_a_gradient_whose_elements_share_memory_is_replaced(step: int, layer: nn.Linear) -> None:
    optimizer = attached(layer, lr=1.0)
    memory = torch.arange(7.0, dtype=torch.float64)
    layer.weight.grad = memory.as_strided((3, 5), (step, 1))
    change = change_of(layer, optimizer.step)
    torch.testing.assert_close(change, (2 - torch.arange(5.0).double()).expand(3, 5))
    assert torch.equal(memory, torch.arange(7.0, dtype=torch.float64))


def test_optimizer_that_ignores_its_closure(layer: nn.Linear) -> None:
    optimizer = attached(layer, kind=Own)
    loss_of(layer).backward()
    assert_means_kept(layer, lambda: optimizer.step(lambda: None))


class Reporting(Own):
    """Takes its closure beside metrics, and gives it a number."""

    def step(self, metrics: Any = None, closure: Any = None) -> Any:
        assert not metrics
        loss = closure and closure(1.0)
        super().step()
        return loss


def test_closure_gets_its_arguments_and_gives_its_loss(layer: nn.Linear) -> None:
    optimizer = attached(layer, kind=Reporting)

    def closure(scale: float) -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        (scale * loss_of(layer)).backward()
        return 7.0

    assert optimizer.step({}, closure) == optimizer.step(closure=closure) == 7.0
    assert_means_kept(layer, lambda: optimizer.step({}, closure))
    assert optimizer.step(None) is None


def test_step_that_calls_the_step_of_its_base(where: Any, layer: nn.Linear) -> None:
    twin = copy.deepcopy(layer)
    nested = attached(layer, where, Inherited, "inside", lr=1e-3, weight_decay=0.1)
    plain = attached(twin, where, Adam, lr=1e-3, weight_decay=0.1)
    calls: list[object] = []
    nested.register_step_pre_hook(lambda *args: calls.append(args))
    train(layer, nested, steps=5)
    train(twin, plain, steps=5)
    assert len(calls) == 10  # or there is nothing nested here
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-14)


def test_step_that_raises_leaves_the_next_ones_right(where: Any, layer: nn.Linear) -> None:
    optimizer = attached(layer, where, **DECAYED)

    def closure() -> None:
        loss_of(layer).backward()
        raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        layer.weight.data += 1  # a new start, which no old mean may undo
    assert_means_kept(layer, lambda: train(layer, optimizer))


class Bare(Optimizer):
    """Has not called the constructor of its base."""

    def __init__(self) -> None:
        pass


def test_not_an_optimizer(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters())
    zero = type("ZeRO", (), {"__module__": "deepspeed.runtime", "step": None})()
    foreign: Any = type("Linear", (), {"__module__": "flax.nnx"})()
    flattens = r"ZeRO\. DeepSpeed flattens .*: call gcx\.torch\.centralize_in_backward\(model\)"
    for other, message in (
        (Wrapper(layer), r"\.Wrapper; .*\.optimizer"),
        (torch.optim.lr_scheduler.ConstantLR(optimizer), r"\.ConstantLR; .*\.optimizer"),
        (Bare(), r"\.Bare; .*\.optimizer"),
        ([layer.weight], "list$"),
        (SGD, r"the class torch\.optim\.sgd\.SGD$"),
        (gcx.optim.SGD(0.1), r"gcx\.optim\.SGD$"),
        (foreign, r"flax\.nnx\.Linear; for flax use gcx\.optax$"),
        (zero, flattens),
    ):
        with pytest.raises(TypeError, match=rf"is a torch\.optim\.Optimizer, not \S*{message}"):
            gcx.torch.centralize(other, layer)
    for other, message in ((layer.parameters(), "generator$"), (foreign, r"use gcx\.optax$")):
        with pytest.raises(TypeError, match=rf"model is a torch\.nn\.Module, not .*{message}"):
            gcx.torch.centralize(optimizer, other)
    with pytest.raises(TypeError, match=r"got torch\.\S+\.Linear; for torch use gcx\.torch$"):
        gcx.centralize(layer)
    in_backward = type("InBackward", (Optimizer,), {})  # updates in backward, as LOMO does
    with pytest.raises(TypeError, match=r"InBackward has no step.*centralize_in_backward"):
        gcx.torch.centralize(in_backward(layer.parameters(), {}), layer)
    optimizer.param_groups.clear()
    with pytest.raises(ValueError, match="nothing to centralize"):
        gcx.torch.centralize(optimizer, layer)


@pytest.mark.parametrize("limit", [0.5, float("inf")])
def test_closure_that_accumulates_and_clips(limit: float, where: Any, layer: nn.Linear) -> None:
    """It clips the whole gradient, as in a loop without a closure."""
    twin = copy.deepcopy(layer)
    optimizer, other = (attached(one, where, weight_decay=0.1) for one in (layer, twin))

    def closure(model: nn.Linear) -> None:
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), limit)

    for _ in range(4):
        for model in (layer, twin):
            backward(model, optimizer if model is layer else other)
        optimizer.step(lambda: closure(layer))
        closure(twin)
        other.step()
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-14)


def test_rules_that_change_count_once_the_plan_is_asked_for(layer: nn.Linear) -> None:
    overrides = {"weight": "oi"}
    optimizer = SGD(layer.parameters(), lr=0.01)
    handle = gcx.torch.centralize(optimizer, layer, overrides=overrides)
    train(layer, optimizer)
    overrides["weight"] = "io"
    assert str(handle.plan[0].layout) == "io"
    change = change_of(layer, lambda: train(layer, optimizer))
    assert_centralized(change, layout="io", rtol=RTOL)


def test_weights_that_become_narrow_warn_once(layer: nn.Linear) -> None:
    optimizer = attached(layer, "update")
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1), (torch.bfloat16, 0)):
        layer.to(dtype).zero_grad()
        layer.weight.grad = torch.ones_like(layer.weight)
        with warnings.catch_warnings(record=True, action="always") as caught:
            optimizer.step()
        assert len(caught) == count
        assert all("weight is torch.bfloat16" in str(each.message) for each in caught)


def test_plan_lists_the_parameters_of_the_optimizer(layer: nn.Linear) -> None:
    """They may be a part of the model, or not be in it."""
    model = nn.Sequential(nn.Linear(2, 2), layer)
    handle = gcx.torch.centralize(optimizer := SGD(layer.parameters()), model, strength=0.3)
    assert [row.name for row in handle.plan] == ["1.weight", "1.bias"]
    shown = "<gcx plan: 1 of 2 parameters centralized>>"
    assert repr(handle) == (
        f"<GradientCentralization of SGD, where='gradient', strength=0.3, {shown}"
    )
    assert gcx.torch.AdamW(layer, strength=0.3).fallbacks == ["strength is 0.3"]
    optimizer.add_param_group({"params": nn.Linear(2, 7).parameters()})
    assert [row.reason for row in handle.plan[2:]] == ["unknown: it is not in the model"] * 2
    layer.weight.grad = GRAD.clone()
    with pytest.raises(RuntimeError, match=r"shape \(7, 2\) that is not in the model"):
        optimizer.step()
    assert torch.equal(layer.weight.grad, GRAD)
    handle.remove()
    assert repr(handle).startswith("<GradientCentralization of SGD, removed, ")
    copy.deepcopy(optimizer)  # loses nothing, and does not warn
