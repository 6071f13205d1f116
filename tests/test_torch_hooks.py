"""How gcx.torch.centralize lives with an optimizer: attaching, stepping, leaving, and errors."""

from __future__ import annotations

import copy
import gc
import warnings
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any
from weakref import ref

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn, optim
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import gcx.torch
from gcx.testing import assert_centralized

from torch_training import (
    GRAD,
    RTOL,
    assert_means_kept,
    attached,
    change_of,
    loss_of,
    new_layer,
    train,
)

pytestmark = pytest.mark.one_framework


@pytest.fixture
def layer() -> nn.Linear:
    return new_layer()


class Inherited(Adam):
    """Calls the step of its base class, so that the hooks run twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Own(Optimizer):
    """Not one of torch's: adds weight decay to the gradient, and may fail."""

    def __init__(self, params: Any, **options: float) -> None:
        super().__init__(params, {"lr": 0.01, **options})
        self.fails = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        del closure
        if self.fails:
            raise KeyboardInterrupt
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad + group.get("weight_decay", 0) * p))


class Shrinking(SGD):
    """Shrinks the weights apart from the gradient, in a step of its own, and frees gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(p.grad, alpha=group["lr"])
                p.grad = None


# What a handle shows and undoes


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
    optimizer = SGD(layer.parameters(), lr=0.01, momentum=0.9)
    gcx.torch.centralize(optimizer, layer, where=where)
    train(twin, plain)
    train(layer, optimizer)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    assert optimizer.state_dict()["state"][0].keys() == plain.state_dict()["state"][0].keys()
    optimizer.load_state_dict(optimizer.state_dict())
    assert_centralized(change_of(layer, lambda: train(layer, optimizer)), rtol=RTOL)


def test_handle_that_nobody_keeps(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01)
    gcx.torch.centralize(optimizer, nn.Sequential(layer))
    gc.collect()
    assert_centralized(change_of(layer, lambda: train(layer, optimizer)), rtol=RTOL)
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


@pytest.mark.parametrize("attach", ATTACHING.values(), ids=ATTACHING)
def test_optimizer_and_model_are_freed_at_once(attach: Any) -> None:
    layer = new_layer()
    optimizer = attach(layer)
    train(layer, optimizer)
    alive = ref(layer), ref(optimizer)
    gc.disable()
    try:
        del layer, optimizer
        assert [is_alive() for is_alive in alive] == [None, None]
    finally:
        gc.enable()


def test_handle_that_is_removed_frees_the_model_at_once(where: Any, layer: nn.Linear) -> None:
    model = nn.Sequential(layer)
    is_alive = ref(model)
    optimizer = SGD(layer.parameters(), lr=0.01)
    handle = gcx.torch.centralize(optimizer, model, where=where)
    train(layer, optimizer)
    gc.disable()  # or it might be the collector of cycles that frees it
    try:
        handle.remove()
        del handle, model
        assert is_alive() is None
    finally:
        gc.enable()


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


# Copies


class Module(nn.Module):
    """Holds its optimizer and the handle, as modules of Lightning do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = new_layer()
        self.optimizer = SGD(self.layer.parameters(), lr=0.01, momentum=0.9)
        self.handle = gcx.torch.centralize(self.optimizer, self)


def test_copy_of_a_handle_looks_at_the_copy_of_the_model() -> None:
    model = Module()
    train(model.layer, model.optimizer)
    with pytest.warns(UserWarning, match="does not centralize"):
        twin = copy.deepcopy(model)
    model.layer.weight = nn.Parameter(torch.ones(3, 5))
    loss_of(twin.layer).backward()
    twin.handle.centralize_grads_()
    assert_centralized(twin.layer.weight.grad, rtol=RTOL)
    twin.layer.weight = nn.Parameter(torch.ones(3, 5))
    with pytest.raises(RuntimeError, match=r"layer\.weight was replaced"):
        twin.handle.centralize_grads_()


# The switch of a parameter group


def off_and_on(layer: nn.Linear) -> tuple[nn.Sequential, SGD]:
    """Two layers of which the first is switched off."""
    model = nn.Sequential(nn.Linear(5, 5).double(), layer)
    off = {"params": model[0].parameters(), "centralize": False}
    return model, SGD([off, {"params": layer.parameters()}], lr=0.01, momentum=0.9)


def is_centralized(weight: Tensor, optimizer: Optimizer, model: nn.Module) -> bool:
    change = change_of(weight, lambda: train(model, optimizer))
    return bool(change.mean(1).abs().max() < RTOL * change.abs().max())


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


# Momentum from before


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_momentum_from_before_is_centralized(kind: Any, layer: nn.Linear) -> None:
    options = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(layer.parameters(), lr=0.01, **options)
    train(layer, optimizer)
    key = "momentum_buffer" if kind is SGD else "exp_avg"
    momentum, of_bias = (optimizer.state[p][key] for p in (layer.weight, layer.bias))
    expected, bias_before = momentum - momentum.mean(1, keepdim=True), of_bias.clone()
    with pytest.warns(UserWarning, match=r"momentum of 1 weights \(weight") as caught:
        gcx.torch.centralize(optimizer, layer)
    assert caught[0].filename == __file__
    torch.testing.assert_close(momentum, expected, rtol=0, atol=1e-14)
    assert torch.equal(of_bias, bias_before)


@pytest.mark.parametrize("pack", [Tensor.byte, Tensor.flatten], ids=["integers", "shape"])
def test_momentum_in_another_form_is_left_alone(pack: Any, layer: nn.Linear) -> None:
    optimizer = Adam(layer.parameters())
    state = optimizer.state[layer.weight]
    state["exp_avg"] = packed = pack(torch.ones_like(layer.weight))
    with pytest.warns(UserWarning, match=r"1 weights \(weight, .* form without a mean"):
        gcx.torch.centralize(optimizer, layer)
    assert bool((packed == 1).all())


def test_momentum_of_a_loaded_checkpoint_is_centralized(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01, momentum=0.9)
    train(layer, optimizer)
    plain = optimizer.state_dict()
    resumed = SGD(layer.parameters(), lr=0.01, momentum=0.9)
    handle = gcx.torch.centralize(resumed, layer)
    with pytest.warns(UserWarning, match="momentum") as caught:
        resumed.load_state_dict(plain)
    assert caught[0].filename == __file__
    assert_centralized(change_of(layer, lambda: train(layer, resumed)), rtol=RTOL)
    handle.remove()
    resumed.load_state_dict(plain)
    momentum = resumed.state[layer.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[layer.weight]["momentum_buffer"])


def test_momentum_of_bfloat16_is_told_from_rounding() -> None:
    """A mean of a few percent is not rounding, though an element has but eight bits."""
    layer = nn.Linear(512, 4).bfloat16()
    optimizer = SGD(layer.parameters(), momentum=0.9)
    momentum = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    momentum = (momentum - momentum.mean(1, keepdim=True)).bfloat16()
    for offset, match in ((0.1, "momentum of 1 weights"), (0.0, None)):
        optimizer.state[layer.weight]["momentum_buffer"] = (momentum + offset).bfloat16()
        with pytest.warns(UserWarning, match=match) if match else nullcontext():
            gcx.torch.centralize(optimizer, layer).remove()
        found = optimizer.state[layer.weight]["momentum_buffer"].float().mean(1).abs().max()
        assert found < 1e-3


def test_memory_of_lbfgs_is_centralized(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(5, 5).double(), nn.Tanh(), layer)
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    with pytest.warns(UserWarning, match=r"momentum of 2 weights \(0.weight"):
        gcx.torch.centralize(optimizer, model)
    for one in (model[0], layer):
        change = change_of(one, lambda: [optimizer.step(closure) for _ in range(3)])
        assert_centralized(change, rtol=RTOL)


def test_momentum_of_what_is_no_gradient_stays(layer: nn.Linear) -> None:
    optimizer = RMSprop(layer.parameters(), momentum=0.9)
    train(layer, optimizer)
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    before = momentum.clone()
    gcx.torch.centralize(optimizer, layer)
    assert torch.equal(momentum, before)


class Packed(Tensor):
    """As the states of low-bit optimizers: a tensor that has no mean."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "mean" in function.__name__:
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs)


def test_momentum_without_a_mean_does_not_keep_a_checkpoint_from_loading(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01, momentum=0.9)
    train(layer, optimizer)
    state = optimizer.state[layer.weight]
    before = state["momentum_buffer"].clone()
    state["momentum_buffer"] = before.clone().as_subclass(Packed)
    saved = optimizer.state_dict()
    for load in (
        lambda: gcx.torch.centralize(optimizer, layer),
        lambda: optimizer.load_state_dict(saved),
    ):
        with pytest.warns(UserWarning, match=r"1 weights \(weight, .* form without a mean"):
            load()
        momentum = optimizer.state[layer.weight]["momentum_buffer"]
        assert isinstance(momentum, Packed)
        assert torch.equal(momentum.as_subclass(Tensor), before)


# Parameters that come, go, or have no gradient


def test_layer_added_later_is_covered_with_its_own_decay(where: Any, layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(5, 5).double())
    optimizer = SGD(model.parameters(), lr=0.01, weight_decay=0.3)
    handle = gcx.torch.centralize(optimizer, model, where=where)
    model.append(layer)
    optimizer.add_param_group({"params": layer.parameters(), "weight_decay": 0.1})
    assert_means_kept(
        model[0].weight, lambda: assert_means_kept(layer, lambda: train(model, optimizer))
    )
    assert [row.name for row in handle.plan] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_parameter_without_gradient_does_not_move(where: Any, layer: nn.Linear) -> None:
    idle = nn.Linear(5, 3).double()
    model = nn.ModuleList([layer, idle])
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    decay = "outside" if where == "update" else None
    gcx.torch.centralize(optimizer, model, where=where, decay=decay)
    before = idle.weight.detach().clone()
    train(layer, optimizer)
    assert torch.equal(idle.weight, before)


def test_expanded_gradient_is_replaced(layer: nn.Linear) -> None:
    optimizer = attached(layer, lr=1.0)
    row = torch.arange(5.0, dtype=torch.float64)
    layer.weight.grad = row.expand(3, 5)
    change = change_of(layer, optimizer.step)
    torch.testing.assert_close(change, (2 - row).expand(3, 5))
    assert torch.equal(row, torch.arange(5.0, dtype=torch.float64))


def test_gradient_of_bfloat16_weights(layer: nn.Linear) -> None:
    layer = layer.bfloat16()
    gcx.torch.centralize(optimizer := SGD(layer.parameters(), lr=0.1, weight_decay=0.25), layer)
    grad, weight = GRAD.bfloat16(), layer.weight.detach().clone()
    layer.weight.grad = grad.clone()
    optimizer.step()
    mean = grad.double().mean(1, keepdim=True) + 0.25 * weight.double().mean(1, keepdim=True)
    assert_one_rounding(layer.weight.grad, grad.double() - mean)


def assert_one_rounding(found: Tensor, exact: Tensor) -> None:
    half_ulp = torch.finfo(found.dtype).eps / 2
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * half_ulp, atol=1e-7)


# Steps that are not plain


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
        model(torch.rand(4, 5).double()).square().sum().backward()

    assert_centralized(change_of(model[1], lambda: optimizer.step(closure)), rtol=RTOL)


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
    nested = attached(layer, where, Inherited, lr=1e-3, weight_decay=0.1)
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
        with torch.no_grad():
            layer.weight += 1  # a new start, which no old mean may undo
    optimizer.fails = False
    assert_centralized(change_of(layer, lambda: train(layer, optimizer)), rtol=RTOL)


# Gradient scaling


def train_scaled(layer: nn.Module, optimizer: Optimizer, *, unscale: bool = False) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(layer)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_with_coupled_decay(
    fused: bool, maximize: bool, unscale: bool, layer: nn.Linear
) -> None:
    """A fused optimizer gets the gradients scaled, and so must decay be that goes with them."""
    twin = copy.deepcopy(layer)
    options: Any = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.125, "maximize": maximize}
    optimizer, plain = attached(layer, fused=fused, **options), attached(twin, **options)
    change = change_of(layer, lambda: train_scaled(layer, optimizer, unscale=unscale))
    assert_centralized(change, rtol=RTOL)
    train(twin, plain)
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-12)


# Weight decay


WITH_DECAY = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and "weight_decay" in signature(kind).parameters
]


@pytest.mark.parametrize(
    ("kind", "maximize"),
    [(kind, False) for kind in WITH_DECAY]
    + [(kind, True) for kind in WITH_DECAY if "maximize" in signature(kind).parameters],
)
def test_decay_is_placed_as_every_optimizer_of_torch_applies_it(kind: Any, maximize: bool) -> None:
    """By experiment: coupled decay does what the gradient does that has it added by hand."""
    options = {"lr": 0.01, "maximize": True} if maximize else {"lr": 0.01}
    layer = nn.Linear(5, 3, bias=False).double()
    start = layer.weight.detach().clone()
    decay = -0.1 * start if maximize else 0.1 * start

    def stepped(weight_decay: float, grad: Tensor) -> Tensor:
        twin = copy.deepcopy(layer)
        twin.weight.grad = grad.clone()
        kind(twin.parameters(), weight_decay=weight_decay, **options).step()
        return twin.weight.detach()

    is_coupled = torch.allclose(stepped(0.1, GRAD), stepped(0.0, GRAD + decay))

    optimizer = kind(layer.parameters(), weight_decay=0.1, **options)
    gcx.torch.centralize(optimizer, layer)
    layer.weight.grad = GRAD.clone()
    optimizer.step()
    subtracted = GRAD + decay if is_coupled else GRAD
    torch.testing.assert_close(layer.weight.grad, GRAD - subtracted.mean(1, keepdim=True))


DECOUPLED = {
    "AdamW": AdamW,
    "Adafactor": optim.Adafactor,
    "Muon": optim.Muon,
    **{
        kind.__name__: partial(kind, decoupled_weight_decay=True)
        for kind in WITH_DECAY
        if "decoupled_weight_decay" in signature(kind).parameters
    },
}


@pytest.mark.parametrize(
    "lr", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["float", "tensor"]
)
@pytest.mark.parametrize("kind", DECOUPLED)
def test_decay_outside_shrinks_the_means_and_nothing_else_does(kind: str, lr: Any) -> None:
    layer = nn.Linear(5, 3, bias=False).double()
    means = layer.weight.detach().mean(1)
    optimizer = DECOUPLED[kind](layer.parameters(), lr=lr, weight_decay=0.5)
    gcx.torch.centralize(optimizer, layer, where="update", decay="outside")
    train(layer, optimizer, steps=4)
    torch.testing.assert_close(layer.weight.detach().mean(1), means * (1 - 0.01 * 0.5) ** 4)


@pytest.mark.parametrize(("decay", "keeps_means"), [("inside", True), ("outside", False)])
def test_unknown_optimizer_is_told(decay: Any, keeps_means: bool, layer: nn.Linear) -> None:
    optimizer = Own(layer.parameters(), weight_decay=0.5)
    gcx.torch.centralize(optimizer, layer, decay=decay)
    before, mean = layer.weight.detach().clone(), layer.weight.detach().mean(1)
    layer.weight.grad, layer.bias.grad = GRAD.clone(), torch.zeros_like(layer.bias)
    optimizer.step()
    update = GRAD - GRAD.mean(1, keepdim=True) + 0.5 * before
    if keeps_means:
        update -= 0.5 * mean[:, None]
    torch.testing.assert_close(layer.weight.detach(), before - 0.01 * update)


def test_unknown_optimizer_must_be_told(layer: nn.Linear) -> None:
    optimizer = Own(layer.parameters(), weight_decay=0.5)
    with pytest.raises(ValueError, match=r"does Own add.*decay='inside'.*decay='outside'"):
        gcx.torch.centralize(optimizer, layer)
    optimizer.param_groups[0]["weight_decay"] = 0
    gcx.torch.centralize(optimizer, layer)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    layer.weight.grad = GRAD.clone()
    with pytest.raises(ValueError, match="does Own add"):
        optimizer.step()
    assert torch.equal(layer.weight.grad, GRAD)


def test_subclass_with_its_own_step_is_unknown(layer: nn.Linear) -> None:
    attached(layer, kind=type("Renamed", (SGD,), {}), weight_decay=0.1)
    with pytest.raises(ValueError, match="does Shrinking add"):
        attached(layer, kind=Shrinking, weight_decay=0.1)


def test_decay_that_does_not_fit(layer: nn.Linear) -> None:
    adamw, sgd = AdamW(layer.parameters()), SGD(layer.parameters())
    with pytest.raises(ValueError, match=r"AdamW shrinks the weights apart.*where='update'"):
        gcx.torch.centralize(adamw, layer, decay="inside")
    with pytest.raises(ValueError, match=r"SGD adds weight_decay.*where='gradient'"):
        gcx.torch.centralize(sgd, layer, where="update", decay="outside")


def test_update_with_decay_outside_needs_to_know_the_rule(layer: nn.Linear) -> None:
    by_itself = AdamW(layer.parameters())
    by_itself.param_groups[0]["lr"] = None  # as of Adafactor with a relative step
    nameless = Own(layer.parameters(), decay=0.1)
    unknown = Shrinking(layer.parameters(), lr=0.01, weight_decay=0.1)
    options: Any = {"where": "update", "decay": "outside"}
    for optimizer in (by_itself, nameless, unknown):
        with pytest.raises(ValueError, match=r"rule of its own; leave decay inside.*'decoupled_we"):
            gcx.torch.centralize(optimizer, layer, **options)
    unknown.param_groups[0]["weight_decay"] = 0
    gcx.torch.centralize(unknown, layer, **options)
    assert_means_kept(layer, lambda: train(layer, unknown, steps=1))
    unknown.param_groups[0]["weight_decay"] = 0.1
    loss_of(layer).backward()
    with pytest.raises(ValueError, match="Shrinking may have a rule of its own"):
        unknown.step()
    unknown.param_groups[0]["decoupled_weight_decay"] = True
    means = layer.weight.detach().mean(1)
    train(layer, unknown, steps=4)
    torch.testing.assert_close(layer.weight.detach().mean(1), means * (1 - 0.01 * 0.1) ** 4)


# Errors


def test_not_an_optimizer(layer: nn.Linear) -> None:
    wrapper = Wrapper(SGD(layer.parameters()))
    scheduler = torch.optim.lr_scheduler.ConstantLR(wrapper.optimizer)
    for other in (Wrapper(layer), scheduler):
        with pytest.raises(TypeError, match=r"not a (Wrapper|ConstantLR).*\.optimizer"):
            gcx.torch.centralize(other, layer)
    with pytest.raises(TypeError, match="not a list"):
        gcx.torch.centralize([layer.weight], layer)
    with pytest.raises(TypeError, match=r"model is a torch\.nn\.Module, not a generator"):
        gcx.torch.centralize(wrapper.optimizer, layer.parameters())

    class InBackward(Optimizer):
        """Updates in backward, as LOMO does."""

    with pytest.raises(TypeError, match=r"InBackward has no step.*centralize_in_backward"):
        gcx.torch.centralize(InBackward(layer.parameters(), {}), layer)


@pytest.mark.parametrize("limit", [0.5, float("inf")])
def test_closure_that_accumulates_and_clips(limit: float, where: Any, layer: nn.Linear) -> None:
    """What is clipped is the whole gradient, as in a loop without a closure."""
    twin = copy.deepcopy(layer)
    optimizer, other = (attached(one, where, weight_decay=0.1) for one in (layer, twin))

    def closure(model: nn.Linear) -> None:
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), limit)

    for _ in range(4):
        for model in (layer, twin):
            model.zero_grad()
            loss_of(model).backward()
        optimizer.step(lambda: closure(layer))
        closure(twin)
        other.step()
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-14)


def test_nothing_to_centralize(layer: nn.Linear) -> None:
    with pytest.raises(ValueError, match=r"nothing to centralize in this SGD:\n.*\nbias "):
        gcx.torch.centralize(SGD([layer.bias]), layer)


def test_parameter_that_is_not_in_the_model(layer: nn.Linear) -> None:
    stranger = nn.Linear(4, 3)
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\) that is not in the model"):
        gcx.torch.centralize(SGD([*layer.parameters(), *stranger.parameters()]), layer)
    optimizer = SGD(layer.parameters())
    gcx.torch.centralize(optimizer, layer)
    optimizer.add_param_group({"params": stranger.parameters()})
    layer.weight.grad = GRAD.clone()
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\) that is not in the model"):
        optimizer.step()
    assert torch.equal(layer.weight.grad, GRAD)


FLATTENED = r"weight is of rank 1, .*centralize_in_backward\(model\)"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias.data)), "bias was replaced"),
        (lambda layer: delattr(layer, "bias"), "bias was replaced"),
        (lambda layer: setattr(layer.weight, "data", layer.weight.data.flatten()), FLATTENED),
    ],
    ids=["bias", "no bias", "flattened"],
)
def test_parameter_that_changes_between_steps(
    spoil: Any, match: str, where: Any, layer: nn.Linear
) -> None:
    optimizer = attached(layer, where)
    train(layer, optimizer)
    spoil(layer)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))


def test_optimizer_and_model_that_take_a_new_weight_together(layer: nn.Linear) -> None:
    optimizer = attached(layer)
    train(layer, optimizer)
    layer.weight = optimizer.param_groups[0]["params"][0] = nn.Parameter(GRAD.clone())
    assert_centralized(change_of(layer, lambda: train(layer, optimizer)), rtol=RTOL)


def test_rules_that_change_count_once_the_plan_is_asked_for(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01)
    overrides = {"weight": "oi"}
    handle = gcx.torch.centralize(optimizer, layer, overrides=overrides)
    train(layer, optimizer)
    overrides["weight"] = "io"
    assert str(handle.plan[0].layout) == "io"
    change = change_of(layer, lambda: train(layer, optimizer))
    assert_centralized(change, layout="io", rtol=RTOL)


def test_sparse_gradient_of_an_embedding_is_nobodys_business(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Embedding(7, 5, sparse=True).double(), layer)
    optimizer = SGD(model.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, model)
    model(torch.tensor([1, 2])).square().sum().backward()
    assert_means_kept(layer, optimizer.step)


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
    model = nn.ModuleList([frozen, layer])
    optimizer = SGD(model.parameters(), lr=0.01)
    gcx.torch.centralize(optimizer, model, where="update")  # no warning of bfloat16
    version = frozen.weight._version
    assert_centralized(change_of(layer, lambda: train(layer, optimizer)), rtol=RTOL)
    assert frozen.weight._version == version


def test_weights_that_become_narrow_warn_once(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01)
    gcx.torch.centralize(optimizer, layer, where="update")
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

    optimizer = Reporting(layer.parameters())
    gcx.torch.centralize(optimizer, layer)

    def closure(scale: float) -> None:
        optimizer.zero_grad()
        (scale * loss_of(layer)).backward()

    assert_centralized(change_of(layer, lambda: optimizer.step({}, closure)), rtol=RTOL)


def test_checkpoint_that_switches_everything_off_warns(layer: nn.Linear) -> None:
    off = SGD([{"params": layer.parameters(), "centralize": False}])
    optimizer = SGD([{"params": layer.parameters(), "centralize": True}])
    gcx.torch.centralize(optimizer, layer)
    with pytest.warns(UserWarning, match="switches off all that there is") as caught:
        optimizer.load_state_dict(off.state_dict())
    assert caught[0].filename == __file__


def test_plan_lists_parameters_that_are_not_in_the_model(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters())
    handle = gcx.torch.centralize(optimizer, layer)
    optimizer.add_param_group({"params": nn.Linear(2, 7).parameters()})
    assert [row.reason for row in handle.plan[2:]] == ["unknown: it is not in the model"] * 2
    handle.remove()
    assert repr(handle).startswith("<GradientCentralization of SGD, removed, ")


@pytest.mark.parametrize("decay", [None, "outside"])
def test_resumed_training_has_the_same_decay(where: Any, decay: Any, layer: nn.Linear) -> None:
    optimizer = AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    gcx.torch.centralize(optimizer, layer, where=where, decay=decay)
    train(layer, optimizer)
    twin = copy.deepcopy(layer)
    resumed = AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    gcx.torch.centralize(resumed, twin, where=where, decay=decay)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((layer, optimizer), (twin, resumed)):
        train(one, other)
    assert torch.equal(layer.weight, twin.weight)
