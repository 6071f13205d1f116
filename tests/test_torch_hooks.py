"""How gcx.torch.centralize lives with an optimizer: attaching, stepping, leaving, and errors."""

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
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import gcx.torch
from gcx.testing import assert_centralized

from torch_training import (
    GRAD,
    RTOL,
    Own,
    assert_means_kept,
    attached,
    backward,
    change_of,
    keeps_means,
    loss_of,
    new_layer,
    train,
)


class Inherited(Adam):
    """Calls the step of its base class, so that the hooks run twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_handle_shows_the_parameters_of_the_optimizer(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(2, 2), layer)
    handle = gcx.torch.centralize(SGD(layer.parameters()), model)
    assert isinstance(handle, gcx.torch.GradientCentralization)
    assert [row.name for row in handle.plan] == ["1.weight", "1.bias"]
    assert repr(handle) == (
        "<GradientCentralization of SGD, where='gradient', "
        "<gcx plan: 1 of 2 parameters centralized>>"
    )


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


ATTACHING: dict[str, Any] = {
    "gradient": attached,
    "update": partial(attached, where="update"),
    "in the step": gcx.torch.AdamW,
    "in backward": attached_in_backward,
}


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Or it might be the collector of cycles that frees something."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("attach", ATTACHING.values(), ids=ATTACHING)
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
    """The step that is under way is that of the plain optimizer already."""
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
    """As that of Accelerate: called an optimizer, without being made as one."""

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


def off_and_on(layer: nn.Linear) -> tuple[nn.Sequential, SGD]:
    """Two layers of which the first is switched off."""
    model = nn.Sequential(nn.Linear(5, 5).double(), layer)
    off = {"params": model[0].parameters(), "centralize": False}
    return model, SGD([off, {"params": layer.parameters()}], lr=0.01, momentum=0.9)


def is_centralized(weight: Tensor, optimizer: Optimizer, model: nn.Module) -> bool:
    return keeps_means(weight, lambda: train(model, optimizer))


def test_group_that_is_switched_off(where: Any, layer: nn.Linear) -> None:
    model, optimizer = off_and_on(layer)
    handle = gcx.torch.centralize(optimizer, model, where=where)
    assert handle.plan[0].reason == "switched off: 'centralize' is False in its parameter group"
    assert [row.name for row in handle.plan if row.layout is not None] == ["1.weight"]
    start = layer.weight.detach().clone()
    assert not is_centralized(model[0].weight, optimizer, model)
    assert_centralized(layer.weight.detach() - start, rtol=RTOL)


def test_switch_survives_checkpoints_that_know_it_and_that_do_not(
    where: Any, layer: nn.Linear
) -> None:
    model, optimizer = off_and_on(layer)
    gcx.torch.centralize(optimizer, model, where=where)
    new = copy.deepcopy(optimizer.state_dict())
    assert [group.get("centralize") for group in new["param_groups"]] == [False, None]
    old = copy.deepcopy(new)
    del old["param_groups"][0]["centralize"]
    optimizer.load_state_dict(old)
    assert not is_centralized(model[0].weight, optimizer, model)
    optimizer.param_groups[0]["centralize"] = True
    optimizer.load_state_dict(new)
    assert not is_centralized(model[0].weight, optimizer, model)
    assert "centralize" not in old["param_groups"][0]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(SGD(model.parameters()).state_dict())


def test_group_switched_on_in_mid_training(where: Any, layer: nn.Linear) -> None:
    model, optimizer = off_and_on(layer)
    gcx.torch.centralize(optimizer, model, where=where)
    train(model, optimizer)
    optimizer.param_groups[0]["centralize"] = True
    if where == "gradient":
        loss_of(model).backward()
        with pytest.warns(UserWarning, match=r"momentum of 1 weights \(0.weight") as caught:
            optimizer.step()
        assert caught[0].filename == __file__
    assert is_centralized(model[0].weight, optimizer, model)


def test_group_that_is_switched_off_is_not_asked_for_anything(where: Any, layer: nn.Linear) -> None:
    """Neither how decay is applied, nor to be in the model."""
    stranger = nn.Linear(5, 3).double()
    off = {"params": stranger.parameters(), "centralize": False, "weight_decay": 0.1}
    optimizer = Own([off, {"params": layer.parameters()}])
    gcx.torch.centralize(optimizer, layer, where=where)
    loss_of(stranger).backward()
    loss_of(layer).backward()
    assert_means_kept(layer, optimizer.step)


def test_group_without_weights_is_not_asked_for_its_decay(layer: nn.Linear) -> None:
    optimizer = Own([{"params": [layer.bias], "weight_decay": 0.1}, {"params": [layer.weight]}])
    gcx.torch.centralize(optimizer, layer)
    assert is_centralized(layer.weight, optimizer, layer)


def test_layer_added_later_is_covered_with_its_own_decay(where: Any, layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(5, 5).double())
    optimizer = attached(model, where, weight_decay=0.3)
    model.append(layer)
    optimizer.add_param_group({"params": layer.parameters(), "weight_decay": 0.1})
    assert_means_kept(model[0], lambda: assert_means_kept(layer, lambda: train(model, optimizer)))
    names = [row.name for row in gcx.torch.centralized(optimizer).plan]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_parameter_without_gradient_does_not_move(where: Any, layer: nn.Linear) -> None:
    model = nn.ModuleList([layer, idle := new_layer(1)])
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    decay = "outside" if where == "update" else None
    gcx.torch.centralize(optimizer, model, where=where, decay=decay)
    before = idle.weight.detach().clone()
    train(layer, optimizer)
    assert torch.equal(idle.weight, before)


@pytest.mark.parametrize("step", [0, 1])
def test_a_gradient_whose_elements_share_memory_is_replaced(step: int, layer: nn.Linear) -> None:
    optimizer = attached(layer, lr=1.0)
    memory = torch.arange(7.0, dtype=torch.float64)
    layer.weight.grad = memory.as_strided((3, 5), (step, 1))
    change = change_of(layer, optimizer.step)
    torch.testing.assert_close(change, (2 - torch.arange(5.0).double()).expand(3, 5))
    assert torch.equal(memory, torch.arange(7.0, dtype=torch.float64))


class Bare(torch.optim.Optimizer):
    """Has not called the constructor of its base."""

    def __init__(self) -> None:
        pass


def test_an_optimizer_without_hooks_or_groups_is_refused(layer: nn.Linear) -> None:
    with pytest.raises(TypeError, match=r"is a torch.optim.Optimizer, not .*Bare"):
        gcx.torch.centralize(Bare(), layer)
    optimizer = torch.optim.SGD(layer.parameters())
    optimizer.param_groups.clear()
    with pytest.raises(ValueError, match="nothing to centralize"):
        gcx.torch.centralize(optimizer, layer)


def test_optimizer_that_ignores_its_closure(layer: nn.Linear) -> None:
    optimizer = attached(layer, kind=Own)
    loss_of(layer).backward()
    assert_means_kept(layer, lambda: optimizer.step(lambda: None))


@pytest.mark.parametrize("is_added", [True, False])
def test_group_that_a_closure_adds_or_switches_on(where: Any, is_added: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)).double()
    groups: list[Any] = [{"params": [*part.parameters()]} for part in model]
    groups[1]["centralize"] = is_added
    optimizer = SGD(groups[: 1 if is_added else 2], lr=0.1, weight_decay=0.1)
    gcx.torch.centralize(optimizer, model, where=where)

    def closure() -> None:
        if is_added:
            optimizer.add_param_group(groups[1])
        optimizer.param_groups[1]["centralize"] = True
        loss_of(model).backward()

    assert_means_kept(model[1], lambda: optimizer.step(closure))


def test_closure_gives_its_loss_and_runs_with_gradients_on(layer: nn.Linear) -> None:
    optimizer = attached(layer)

    def closure() -> float:
        assert torch.is_grad_enabled()
        loss_of(layer).backward()
        return 7.0

    assert optimizer.step(closure) == optimizer.step(closure=closure) == 7.0
    assert optimizer.step(None) is None


def test_step_that_calls_the_step_of_its_base(where: Any, layer: nn.Linear) -> None:
    twin = copy.deepcopy(layer)
    nested = Inherited(layer.parameters(), lr=1e-3, weight_decay=0.1)
    gcx.torch.centralize(nested, layer, where=where, decay="inside")
    plain = attached(twin, where, Adam, lr=1e-3, weight_decay=0.1)
    calls: list[object] = []
    nested.register_step_pre_hook(lambda *args: calls.append(args))
    train(layer, nested, steps=5)
    train(twin, plain, steps=5)
    assert len(calls) == 10  # or there is nothing nested here
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-14)


def test_step_that_raises_leaves_the_next_ones_right(layer: nn.Linear) -> None:
    optimizer = attached(layer, "update", Own)
    train(layer, optimizer)
    optimizer.fails = True
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        layer.weight.data += 1  # a new start, which no old mean may undo
    optimizer.fails = False
    assert_means_kept(layer, lambda: train(layer, optimizer))


def test_not_an_optimizer(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters())
    zero = type("ZeRO", (), {"__module__": "deepspeed.runtime", "step": None})()
    foreign: Any = type("Linear", (), {"__module__": "flax.nnx"})()
    flattens = r"ZeRO\. DeepSpeed flattens .*: call gcx\.torch\.centralize_in_backward\(model\)"
    for other, message in (
        (Wrapper(layer), r"\.Wrapper; .*\.optimizer"),
        (torch.optim.lr_scheduler.ConstantLR(optimizer), r"\.ConstantLR; .*\.optimizer"),
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


def test_gradients_are_centralized_now_by_the_plan_of_the_handle(layer: nn.Linear) -> None:
    model, optimizer = off_and_on(layer)
    handle = gcx.torch.centralize(optimizer, model)
    with pytest.raises(ValueError, match="there is no gradient to centralize"):
        handle.centralize_grads_()
    loss_of(model).backward()
    before = model[0].weight.grad.clone()
    handle.centralize_grads_()
    assert torch.equal(model[0].weight.grad, before)
    assert_centralized(layer.weight.grad, rtol=RTOL)


def test_frozen_weights_are_passed_over_in_the_update(layer: nn.Linear) -> None:
    frozen = nn.Linear(5, 5).bfloat16().requires_grad_(requires_grad=False)
    optimizer = attached(nn.ModuleList([frozen, layer]), "update")  # no warning of bfloat16
    version = frozen.weight._version
    assert_means_kept(layer, lambda: train(layer, optimizer))
    assert frozen.weight._version == version


def test_weights_that_become_narrow_warn_once(layer: nn.Linear) -> None:
    optimizer = attached(layer, "update")
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1), (torch.bfloat16, 0)):
        layer.to(dtype).zero_grad()
        layer.weight.grad = torch.ones_like(layer.weight)
        with warnings.catch_warnings(record=True, action="always") as caught:
            optimizer.step()
        assert len(caught) == count
        assert all("weight is torch.bfloat16" in str(each.message) for each in caught)


def test_closure_in_another_place(layer: nn.Linear) -> None:
    class Reporting(Own):
        def step(self, metrics: Any = None, closure: Any = None) -> None:
            assert metrics == {}
            closure(1.0)
            super().step()

    optimizer = attached(layer, kind=Reporting)

    def closure(scale: float) -> None:
        optimizer.zero_grad()
        (scale * loss_of(layer)).backward()

    assert_means_kept(layer, lambda: optimizer.step({}, closure))


def test_checkpoint_that_switches_everything_off_warns(layer: nn.Linear) -> None:
    off, optimizer = (
        SGD([{"params": layer.parameters(), "centralize": is_on}]) for is_on in (False, True)
    )
    gcx.torch.centralize(optimizer, layer)
    with pytest.warns(UserWarning, match="switches off all that there is") as caught:
        optimizer.load_state_dict(off.state_dict())
    assert caught[0].filename == __file__


def test_plan_lists_parameters_that_are_not_in_the_model(layer: nn.Linear) -> None:
    handle = gcx.torch.centralize(optimizer := SGD(layer.parameters()), layer)
    optimizer.add_param_group({"params": nn.Linear(2, 7).parameters()})
    assert [row.reason for row in handle.plan[2:]] == ["unknown: it is not in the model"] * 2
    layer.weight.grad = GRAD.clone()
    with pytest.raises(RuntimeError, match=r"shape \(7, 2\) that is not in the model"):
        optimizer.step()
    assert torch.equal(layer.weight.grad, GRAD)
    handle.remove()
    assert repr(handle).startswith("<GradientCentralization of SGD, removed, ")
    copy.deepcopy(optimizer)  # loses nothing, and does not warn
