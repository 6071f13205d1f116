"""Weight decay and the scale of gradients, which a mean must take in."""

from __future__ import annotations

import copy
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import SGD, AdamW

import gcx.torch

from torch_training import GRAD, Own, assert_means_kept, assert_same, attached, loss_of, train


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
    ("kind", "options"),
    [
        (SGD, {}),
        (partial(SGD, maximize=True), {}),
        (SGD, {"where": "update"}),
        (AdamW, {}),
        (AdamW, {"where": "update"}),
        (AdamW, {"where": "update", "decay": "outside"}),
    ],
)
def test_training_goes_on_after_an_infinity(
    kind: Any, options: Any, fused: bool, unscale: bool, layer: nn.Linear
) -> None:
    """A GradScaler skips that step, and the ones after it are what they would have been.

    A fused optimizer gets the gradients scaled, and so must decay be that goes with them.
    """
    twin = copy.deepcopy(layer)
    exact = {"lr": 2**-7, "weight_decay": 0.125}  # in float32, as their product and the scale are
    optimizer, plain = (
        kind(layer.parameters(), fused=fused, **exact),
        kind(twin.parameters(), **exact),
    )
    gcx.torch.centralize(optimizer, layer, **options)
    gcx.torch.centralize(plain, twin, **options)
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


@pytest.mark.parametrize("base", [SGD, optim.Adam, AdamW, optim.NAdam, optim.RAdam])
def test_subclass_with_its_own_step_is_unknown(base: Any, layer: nn.Linear) -> None:
    attached(layer, kind=type("Renamed", (base,), {}), weight_decay=0.1)
    kind = type("Shrinking", (base,), {"step": Shrinking.step})
    with pytest.raises(ValueError, match="does Shrinking add"):
        attached(layer, kind=kind, weight_decay=0.1)
    optimizer = kind(layer.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="by how much a step shrinks"):
        gcx.torch.centralize(optimizer, layer, where="update", decay="outside")


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


def test_decay_outside_of_an_optimizer_without_decay(layer: nn.Linear) -> None:
    optimizer = Own(layer.parameters(), decoupled_weight_decay=True)
    gcx.torch.centralize(optimizer, layer, where="update", decay="outside")
    assert_means_kept(layer, lambda: train(layer, optimizer))


@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("shape", [(4, 64), (512, 1024)], ids=str)
def test_narrow_weights_with_decay(shape: tuple[int, int], layout: str) -> None:
    """The mean is exact here, and rounded once."""
    layer = nn.Linear(*shape[::-1], bias=False, dtype=torch.bfloat16)
    weight, grad = torch.randint(-8, 9, (2, *shape), generator=torch.manual_seed(0)).double()
    layer.weight.data.copy_(weight)
    layer.weight.grad = grad.bfloat16()
    optimizer = SGD(layer.parameters(), lr=0.0, weight_decay=0.5)
    gcx.torch.centralize(optimizer, layer, decay="inside", overrides={"weight": layout})
    optimizer.step()
    expected = grad - (grad + 0.5 * weight).mean(layout.index("i"), keepdim=True)
    assert torch.equal(layer.weight.grad, expected.bfloat16())
