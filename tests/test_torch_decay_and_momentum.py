"""The mean must take in decay and the scale of gradients, and leave momentum from before."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import SGD, Adam, AdamW, RMSprop

import gcx.torch

from torch_training import (
    GRAD,
    WITH_DECAY,
    Own,
    assert_means_kept,
    assert_same,
    attached,
    loss_of,
    new_layer,
    train,
)


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


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("kind", "decay"),
    [(SGD, None), (partial(SGD, maximize=True), None), (AdamW, None), (AdamW, "outside")],
)
def test_training_goes_on_after_an_infinity(
    kind: Any, decay: Any, where: Any, fused: bool, unscale: bool
) -> None:
    """A GradScaler skips that step, and the ones after it are what they would have been.

    A fused optimizer gets the gradients scaled, and so must decay be that goes with them.
    """
    layer, twin = new_layer(), new_layer()
    exact = {"lr": 2**-7, "weight_decay": 0.125}  # in float32, as their product and the scale are
    optimizer = attached(layer, where, kind, decay, fused=fused, **exact)
    plain = attached(twin, where, kind, decay, **exact)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (torch.inf, 1, 1, torch.inf, 1, 1, torch.inf, 1):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(layer)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) == (factor == torch.inf)
    assert scaler.get_scale() == 128.0
    train(twin, plain, steps=5)
    assert_same(layer, twin)


KINDS = WITH_DECAY.values()


@pytest.mark.parametrize(
    ("kind", "maximize"),
    [(kind, False) for kind in KINDS]
    + [(kind, True) for kind in KINDS if "maximize" in signature(kind).parameters],
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

    layer.weight.grad = GRAD.clone()
    attached(layer, kind=kind, weight_decay=0.1, **options).step()
    subtracted = GRAD + decay if is_coupled else GRAD
    torch.testing.assert_close(layer.weight.grad, GRAD - subtracted.mean(1, keepdim=True))


DECOUPLED = {
    **{kind.__name__: kind for kind in (AdamW, optim.Adafactor, optim.Muon)},
    **{
        kind.__name__: partial(kind, decoupled_weight_decay=True)
        for kind in KINDS
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
    optimizer = attached(layer, "update", DECOUPLED[kind], "outside", lr=lr, weight_decay=0.5)
    train(layer, optimizer, steps=4)
    torch.testing.assert_close(layer.weight.detach().mean(1), means * (1 - 0.01 * 0.5) ** 4)


def test_decay_outside_is_that_of_the_group_at_the_step(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(5, 5).double(), layer)
    options = ({"lr": 0.01, "weight_decay": 0.5}, {"lr": 0.02, "weight_decay": 0.1})
    groups = [{"params": m.parameters(), **o} for m, o in zip(model, options, strict=True)]
    gcx.torch.centralize(optimizer := AdamW(groups), model, where="update", decay="outside")
    means = [m.weight.detach().mean(1) for m in model]
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(2):
        train(model, optimizer, steps=1)
        scheduler.step()
    for m, mean, (lr, decay) in zip(model, means, map(dict.values, options), strict=True):
        factor = (1 - lr * decay) * (1 - lr / 2 * decay)
        torch.testing.assert_close(m.weight.detach().mean(1), factor * mean)


@pytest.mark.parametrize("kind", [Own, SGD])
@pytest.mark.parametrize(("decay", "keeps_means"), [("inside", True), ("outside", False)])
def test_optimizer_is_told(decay: Any, keeps_means: bool, kind: Any, layer: nn.Linear) -> None:
    optimizer = attached(layer, kind=kind, decay=decay, weight_decay=0.5)
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


@pytest.mark.parametrize("base", [SGD, Adam, AdamW, optim.NAdam, optim.RAdam])
def test_subclass_with_its_own_step_is_unknown(base: Any, layer: nn.Linear) -> None:
    attached(layer, kind=type("Renamed", (base,), {}), weight_decay=0.1)
    kind = type("Shrinking", (base,), {"step": Shrinking.step})
    with pytest.raises(ValueError, match="does Shrinking add"):
        attached(layer, kind=kind, weight_decay=0.1)
    with pytest.raises(ValueError, match="by how much a step shrinks"):
        attached(layer, "update", kind, "outside", weight_decay=0.1)


def test_decay_that_does_not_fit(layer: nn.Linear) -> None:
    with pytest.raises(ValueError, match=r"AdamW shrinks the weights apart.*where='update'"):
        attached(layer, "gradient", AdamW, "inside")
    with pytest.raises(ValueError, match=r"SGD adds weight_decay.*where='gradient'"):
        attached(layer, "update", SGD, "outside")


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
    without_decay = attached(layer, kind=Own, decoupled_weight_decay=True, **options)
    assert_means_kept(layer, lambda: train(layer, without_decay))


@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("shape", [(4, 64), (512, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_narrow_gradients_with_decay(
    dtype: torch.dtype, shape: tuple[int, int], layout: str
) -> None:
    """The mean is exact here, and rounded once."""
    layer = nn.Linear(*shape[::-1], bias=False, dtype=dtype)
    layer.weight.grad_dtype = torch.bfloat16
    weight, grad = torch.randint(-8, 9, (2, *shape), generator=torch.manual_seed(0)).double()
    layer.weight.data.copy_(weight)
    layer.weight.grad = grad.bfloat16()
    optimizer = SGD(layer.parameters(), lr=0.0, weight_decay=0.5)
    gcx.torch.centralize(optimizer, layer, decay="inside", overrides={"weight": layout})
    optimizer.step()
    expected = grad - (grad + 0.5 * weight).mean(layout.index("i"), keepdim=True)
    assert torch.equal(layer.weight.grad, expected.bfloat16())
    assert torch.equal(layer.weight.double(), weight)


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_momentum_from_before_is_centralized(kind: Any, is_loaded: bool, layer: nn.Linear) -> None:
    key, options = ("momentum_buffer", {"momentum": 0.9}) if kind is SGD else ("exp_avg", {})
    optimizer, resumed = (kind(layer.parameters(), lr=0.01, **options) for _ in range(2))
    train(layer, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    call = partial(gcx.torch.centralize, optimizer, layer)
    if is_loaded:
        gcx.torch.centralize(optimizer := resumed, layer)
        call = partial(optimizer.load_state_dict, copy.deepcopy(saved))
    with pytest.warns(UserWarning, match=r"momentum of 1 weights \(weight") as caught:
        call()
    assert caught[0].filename == __file__
    momentum, of_bias = (saved["state"][k][key] for k in (0, 1))
    found, expected = optimizer.state[layer.weight][key], momentum - momentum.mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert torch.equal(optimizer.state[layer.bias][key], of_bias)
    gcx.torch.centralized(optimizer).remove()
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[layer.weight][key], momentum)


class Packed(Tensor):
    """As the states of low-bit optimizers: a tensor that has no mean."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "mean" in function.__name__:
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("pack", [Tensor.byte, Tensor.flatten, lambda x: x.as_subclass(Packed)])
def test_momentum_in_another_form_is_left_alone(pack: Any, layer: nn.Linear) -> None:
    """It does not keep a checkpoint from loading."""
    optimizer = SGD(layer.parameters(), momentum=0.9)
    state, whole = optimizer.state[layer.weight], torch.ones_like(layer.weight)
    state["momentum_buffer"] = state["exp_avg"] = packed = pack(whole)
    saved = optimizer.state_dict()
    for load in (
        lambda: gcx.torch.centralize(optimizer, layer),
        lambda: optimizer.load_state_dict(saved),
    )[: 2 if type(packed) is Packed else 1]:  # torch unpacks the others
        with pytest.warns(UserWarning, match=r"1 weights \(weight, .* form without a mean"):
            load()
        found = optimizer.state[layer.weight]["momentum_buffer"]
        assert type(found) is type(packed)
        assert torch.equal(found.as_subclass(Tensor), pack(whole).as_subclass(Tensor))


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


@pytest.mark.parametrize(
    ("kind", "given", "options"),
    [
        (RMSprop, {"momentum": 0.9}, {}),
        (SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"decay": "outside"}),
        (SGD, {"momentum": 0.9}, {"strength": 0.3}),
        (Adam, {}, {"strength": 0.3}),
    ],
)
def test_momentum_that_rightly_has_a_mean_is_left_alone(
    kind: Any, given: Any, options: Any, layer: nn.Linear
) -> None:
    """Of divided gradients, of decay or of a part of the mean; a checkpoint of it as well."""
    optimizer = kind(layer.parameters(), lr=0.01, **given)
    train(layer, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    gcx.torch.centralize(optimizer, layer, **options)  # without a warning
    torch.testing.assert_close(optimizer.state_dict()["state"], saved["state"], rtol=0, atol=0)
    optimizer.load_state_dict(copy.deepcopy(saved))
    torch.testing.assert_close(optimizer.state_dict()["state"], saved["state"], rtol=0, atol=0)
