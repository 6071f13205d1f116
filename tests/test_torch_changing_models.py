"""gcx.torch.centralize, and parameters that are frozen, replaced, moved, added or switched off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD, AdamW, Optimizer

import gcx.torch
from gcx.testing import assert_centralized

from torch_training import (
    DECAYED,
    GRAD,
    RTOL,
    Own,
    assert_means_kept,
    attached,
    change_of,
    deeper,
    keeps_means,
    loss_of,
    new_layer,
    train,
)


def test_two_optimizers_of_one_model(where: Any, layer: nn.Linear) -> None:
    """As of a generator and a discriminator; one may leave, and the other stays."""
    model = deeper(layer)
    optimizers = [SGD(one.parameters(), lr=0.01, **DECAYED) for one in (model[0], layer)]
    handles = [gcx.torch.centralize(one, model, where=where) for one in optimizers]

    def training() -> None:
        for one in optimizers * 5:
            train(model, one, steps=1)

    assert_means_kept(model[0], lambda: assert_means_kept(layer, training))
    handles[0].remove()
    change = change_of(model[0], lambda: assert_means_kept(layer, training))
    assert change.mean(1).abs().max() > 1e-4


def test_parameters_frozen_and_unfrozen(where: Any, layer: nn.Linear) -> None:
    model = deeper(layer)
    model[0].requires_grad_(requires_grad=False)
    frozen = model[0].weight.detach().clone()
    optimizer = attached(model, where, **DECAYED)
    assert_means_kept(layer, lambda: train(model, optimizer))
    assert torch.equal(model[0].weight, frozen)
    model[0].requires_grad_()
    layer.requires_grad_(requires_grad=False)
    assert_means_kept(model[0].weight, lambda: train(model, optimizer))


def thaw(layer: nn.Linear) -> Tensor:
    layer.requires_grad_()
    loss = loss_of(layer)
    loss.backward()
    layer.requires_grad_(requires_grad=False)
    return loss


THAWING: dict[str, Callable[[nn.Linear, Any], object]] = {
    "closure": lambda layer, optimizer: optimizer.step(lambda: thaw(layer)),
    "later hook": lambda layer, optimizer: (
        optimizer.register_step_pre_hook(lambda *_: thaw(layer) and None),
        optimizer.step(),
    ),
}


@pytest.mark.parametrize(("decay", "factor"), [("inside", 1.0), ("outside", 1 - 0.01 * 0.5)])
@pytest.mark.parametrize("way", THAWING)
def test_weights_that_are_frozen_when_an_update_begins(
    way: str, decay: Any, factor: float, layer: nn.Linear
) -> None:
    model = nn.ModuleList([layer, idle := new_layer(1)]).requires_grad_(requires_grad=False)
    mean, before = layer.weight.mean(1), idle.weight.clone()
    optimizer = attached(model, "update", AdamW, decay, weight_decay=0.5)
    change_of(layer, lambda: THAWING[way](layer, optimizer))
    torch.testing.assert_close(layer.weight.mean(1), factor * mean, rtol=RTOL, atol=0)
    assert torch.equal(idle.weight, before)


def test_zeroth_order_update(layer: nn.Linear) -> None:
    """It moves weights that ask for no gradient, and have none."""

    class ZerothOrder(SGD):
        def step(self, closure: Any = None) -> None:
            layer.weight.add_(GRAD, alpha=0.01)

    layer.requires_grad_(requires_grad=False)
    assert_means_kept(layer, attached(layer, "update", ZerothOrder).step)


REPLACING: dict[str, Callable[[nn.Sequential], object]] = {
    "assign": lambda model: model.load_state_dict(new_model().state_dict(), assign=True),
    "to_empty": lambda model: (
        model.to_empty(device="meta")
        .to_empty(device="cpu")
        .load_state_dict(new_model().state_dict())
    ),
    "weight_norm": lambda model: parametrizations.weight_norm(model[1]),
    "setattr": lambda model: setattr(model[1], "weight", new_layer(1).weight),
    "new layer": lambda model: model.__setitem__(1, new_layer(1)),
    "bias": lambda model: setattr(model[1], "bias", new_layer(1).bias),
}


def new_model() -> nn.Sequential:
    return nn.Sequential(nn.Tanh(), new_layer())


@pytest.mark.parametrize("change", REPLACING)
def test_parameters_that_were_replaced(where: Any, change: str) -> None:
    """The step of the optimizer would be of no use, and says so each time, before it is made."""
    model = new_model()
    weight = model[1].weight
    optimizer = attached(model, where, **DECAYED)
    train(model, optimizer)
    REPLACING[change](model)
    name = "bias" if change == "bias" else "weight"
    weight.grad, before = GRAD.clone(), weight.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"1\.{name} was replaced in the model.*after that"):
            optimizer.step()
    assert torch.equal(weight.grad, GRAD)
    assert torch.equal(weight, before)
    new = attached(model, where, **DECAYED)
    (weight,) = (p for p in model.parameters() if p.shape == weight.shape)
    assert_means_kept(weight, lambda: train(model, new))


@pytest.mark.parametrize("is_held", [True, False])
def test_frozen_layer_that_was_replaced_by_one_to_train(where: Any, is_held: bool) -> None:
    first = nn.Linear(5, 5).double().requires_grad_(requires_grad=False)
    model = nn.Sequential(first, new_layer())
    optimizer = SGD((model if is_held else model[1]).parameters(), lr=0.1)
    handle = gcx.torch.centralize(optimizer, model, where=where)
    train(model, optimizer)
    model[0] = nn.Linear(5, 5).double()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"0\.weight was frozen, and has been replaced"):
            train(model, optimizer)
        assert handle.plan["1.weight"].layout is not None
    optimizer.add_param_group({"params": [*model[0].parameters()]})
    assert_means_kept(model[0], lambda: train(model, optimizer))


def test_frozen_parameters_may_leave_the_model(where: Any, layer: nn.Linear) -> None:
    """As peft registers the weights of MultiheadAttention anew in each forward pass."""
    frozen = nn.Linear(5, 5).double().requires_grad_(requires_grad=False)
    model = nn.Sequential(frozen, layer)
    optimizer = attached(model, where, **DECAYED)
    for name in ("weight", "bias"):
        setattr(frozen, name, nn.Parameter(getattr(frozen, name).detach(), requires_grad=False))
    assert_means_kept(layer, lambda: train(model, optimizer))
    optimizer.param_groups[0]["params"][0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced in the model"):
        optimizer.step()


MOVING: dict[str, Callable[[nn.Sequential], object]] = {
    "spectral_norm": lambda model: parametrizations.spectral_norm(model[0]),
    "prune": lambda model: prune.identity(model[0], "weight"),
    "to": lambda model: model.to(torch.float64),
    "share_memory": nn.Module.share_memory,
    "wrap": lambda model: model.__setitem__(0, nn.Sequential(nn.Identity(), model[0])),
}


@pytest.mark.parametrize("move", MOVING.values(), ids=MOVING)
def test_parameters_that_have_another_place_now(where: Any, move: Any, layer: nn.Linear) -> None:
    model, weight = nn.Sequential(layer), layer.weight
    optimizer = attached(model, where, **DECAYED)
    train(model, optimizer)
    move(model)
    assert_means_kept(weight, lambda: train(model, optimizer))
    names = [row.name for row in gcx.torch.centralized(optimizer).plan]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("is_flattened", [True, False])
def test_parameter_that_is_flattened_or_deleted(
    is_flattened: bool, where: Any, layer: nn.Linear
) -> None:
    optimizer = attached(layer, where)
    train(layer, optimizer)
    if is_flattened:
        layer.weight.data = layer.weight.data.flatten()
    else:
        del layer.bias
    before, layer.weight.grad = layer.weight.detach().clone(), torch.ones_like(layer.weight)
    flattened = r"weight is of rank 1, .*centralize_in_backward\(model\)"
    with pytest.raises(RuntimeError, match=flattened if is_flattened else "bias was replaced"):
        optimizer.step()
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad.eq(1).all()


def test_optimizer_and_model_that_take_a_new_weight_together(layer: nn.Linear) -> None:
    optimizer = attached(layer)
    train(layer, optimizer)
    layer.weight = optimizer.param_groups[0]["params"][0] = nn.Parameter(GRAD.clone())
    assert_means_kept(layer, lambda: train(layer, optimizer))


def off_and_on(layer: nn.Linear) -> tuple[nn.Sequential, SGD]:
    """Two layers of which the first is switched off."""
    model = nn.Sequential(nn.Linear(5, 5).double(), layer)
    off = {"params": model[0].parameters(), "centralize": False}
    return model, SGD([off, {"params": layer.parameters()}], lr=0.01, momentum=0.9)


def is_centralized(weight: Tensor, optimizer: Optimizer, model: nn.Module) -> bool:
    return keeps_means(weight, lambda: train(model, optimizer))


def test_group_switched_off_and_on(where: Any, layer: nn.Linear) -> None:
    model, optimizer = off_and_on(layer)
    handle = gcx.torch.centralize(optimizer, model, where=where)
    assert handle.plan[0].reason == "switched off: 'centralize' is False in its parameter group"
    assert [row.name for row in handle.plan if row.layout is not None] == ["1.weight"]
    start = layer.weight.detach().clone()
    assert not is_centralized(model[0].weight, optimizer, model)
    assert_centralized(layer.weight.detach() - start, rtol=RTOL)
    optimizer.param_groups[0]["centralize"] = True
    if where == "gradient":
        with pytest.warns(UserWarning, match=r"momentum of 1 weights \(0.weight") as caught:
            optimizer.step()
        assert caught[0].filename == __file__
    assert is_centralized(model[0].weight, optimizer, model)


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
    for groups in (new["param_groups"][:1], 2 * new["param_groups"]):
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict({**new, "param_groups": groups})


def test_groups_with_nothing_to_centralize_are_not_asked(where: Any, layer: nn.Linear) -> None:
    """Neither how decay is applied, nor to be in the model, if they are switched off."""
    stranger, decay = nn.Linear(5, 3).double(), {"weight_decay": 0.1}
    off = {"params": stranger.parameters(), "centralize": False, **decay}
    optimizer = Own([off, {"params": [layer.bias], **decay}, {"params": [layer.weight]}])
    gcx.torch.centralize(optimizer, layer, where=where)
    loss_of(stranger).backward()
    loss_of(layer).backward()
    assert_means_kept(layer, optimizer.step)


def test_layer_added_later_is_covered_with_its_own_decay(where: Any, layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(5, 5).double())
    optimizer = attached(model, where, weight_decay=0.3)
    model.append(layer)
    optimizer.add_param_group({"params": layer.parameters(), "weight_decay": 0.1})
    assert_means_kept(model[0], lambda: assert_means_kept(layer, lambda: train(model, optimizer)))
    names = [row.name for row in gcx.torch.centralized(optimizer).plan]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


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


def test_checkpoint_that_switches_everything_off_warns(layer: nn.Linear) -> None:
    off, optimizer = (
        SGD([{"params": layer.parameters(), "centralize": is_on}]) for is_on in (False, True)
    )
    gcx.torch.centralize(optimizer, layer)
    with pytest.warns(UserWarning, match="switches off all that there is") as caught:
        optimizer.load_state_dict(off.state_dict())
    assert caught[0].filename == __file__


def test_gradients_are_centralized_now_by_the_plan_of_the_handle(layer: nn.Linear) -> None:
    model, optimizer = off_and_on(layer)
    handle = gcx.torch.centralize(optimizer, model)
    loss_of(model).backward()
    before = model[0].weight.grad.clone()
    handle.centralize_grads_()
    assert torch.equal(model[0].weight.grad, before)
    assert_centralized(layer.weight.grad, rtol=RTOL)
