"""gcx.torch.centralize in the training loops that there are, beside the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import LBFGS, SGD, Adam, AdamW, Muon, Optimizer

import gcx.torch
from gcx.testing import assert_centralized

from torch_training import (
    GRAD,
    RTOL,
    X,
    assert_means_kept,
    assert_same,
    attached,
    change_of,
    loss_of,
    new_layer,
    train,
)

DECAYED = {"momentum": 0.9, "weight_decay": 0.1}


def backward(model: nn.Module, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss


def go_on_with_the_gradient(layer: nn.Linear, optimizer: Optimizer) -> None:
    """Later steps centralize what is centralized, and the decay of new weights."""
    loss_of(layer).backward()
    for _ in range(3):
        optimizer.step()


def step_by_a_gradient_with_a_graph(layer: nn.Linear, optimizer: Optimizer) -> None:
    loss_of(layer).backward(create_graph=True)
    assert layer.weight.grad.requires_grad
    optimizer.step()


def schedule(layer: nn.Linear, optimizer: Optimizer) -> None:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=6)
    for _ in range(5):
        train(layer, optimizer, steps=1)
        scheduler.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    "loop", [go_on_with_the_gradient, step_by_a_gradient_with_a_graph, schedule]
)
def test_loops_that_keep_the_means(where: Any, loop: Any, layer: nn.Linear) -> None:
    optimizer = attached(layer, where, **DECAYED)
    assert_means_kept(layer, lambda: loop(layer, optimizer))


def test_accumulated_gradients(where: Any, layer: nn.Linear) -> None:
    """Four parts of a batch do what the batch does."""
    twin = copy.deepcopy(layer)
    optimizer, whole = (attached(one, where, **DECAYED) for one in (layer, twin))

    def training() -> None:
        for _ in range(5):
            for part in X.chunk(4):
                loss_of(layer, part).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    assert_means_kept(layer, training)
    train(twin, whole)
    assert_same(layer, twin)


def test_clipping_in_the_loop_comes_first(layer: nn.Linear) -> None:
    optimizer = attached(layer, lr=0.1)
    start = layer.weight.detach().clone()
    loss_of(layer).backward()
    grad = layer.weight.grad.clone()
    norm = clip_grad_norm_(layer.parameters(), 0.5)
    assert norm > 0.5
    optimizer.step()
    clipped = grad * 0.5 / norm
    expected = start - 0.1 * (clipped - clipped.mean(1, keepdim=True))
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [attached, lambda model, **o: SGD(model.parameters(), **o)])
def test_centralize_grads_before_clipping(make: Any, layer: nn.Linear) -> None:
    """The norm is that of the centralized gradients, of which nothing is lost after it."""
    optimizer = make(layer, lr=0.01, momentum=0.9)

    def training() -> None:
        for _ in range(5):
            backward(layer, optimizer)
            gcx.torch.centralize_grads_(layer)
            assert clip_grad_norm_(layer.parameters(), 0.5) > 0.5
            optimizer.step()
            norm = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()])
            torch.testing.assert_close(norm.item(), 0.5, rtol=1e-5, atol=0)

    assert_means_kept(layer, training)


def test_centralize_grads_touches_nothing_else(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), layer, nn.Linear(5, 3))
    layer.weight.grad, layer.bias.grad = GRAD.clone(), torch.ones_like(layer.bias)
    model[0].weight.grad = conv = torch.rand(3, 2, 2)
    weights = [p.detach().clone() for p in model.parameters()]
    kept = conv.clone()
    gcx.torch.centralize_grads_(model, overrides={"0.*": None})
    assert torch.equal(conv, kept)
    torch.testing.assert_close(layer.weight.grad, GRAD - GRAD.mean(1, keepdim=True))
    assert torch.equal(layer.bias.grad, torch.ones_like(layer.bias))
    assert model[2].weight.grad is None
    assert all(map(torch.equal, weights, model.parameters()))
    gcx.torch.centralize_grads_(model, layers="conv")
    torch.testing.assert_close(conv, kept - kept.mean((1, 2), keepdim=True))


def test_centralize_grads_with_nothing_to_do(layer: nn.Linear) -> None:
    with pytest.raises(ValueError, match=r"no gradient to centralize; call backward\(\) first"):
        gcx.torch.centralize_grads_(layer)
    loss_of(layer).backward()
    with pytest.raises(ValueError, match=r"no gradient to centralize"):
        gcx.torch.centralize_grads_(layer, layers="conv")


@pytest.mark.parametrize("by_step", [False, True])
def test_sparse_gradient_of_a_weight_changes_none(by_step: bool, layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(5, 3).double(), layer)
    optimizer = attached(model)
    model[0].weight.grad, layer.weight.grad = GRAD.clone(), GRAD.to_sparse()
    with pytest.raises(TypeError, match=r"1\.weight has a gradient of layout torch\.sparse_coo"):
        optimizer.step() if by_step else gcx.torch.centralize_grads_(model)
    assert torch.equal(model[0].weight.grad, GRAD)


@pytest.mark.parametrize("step_inside", [False, True])
def test_autocast(step_inside: bool, where: Any) -> None:
    layer = new_layer().float()
    optimizer = attached(layer, where, **DECAYED)

    def training() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = layer(X.float())
                assert out.dtype == torch.bfloat16
                (out - 1).square().sum().backward()
                if step_inside:
                    optimizer.step()
            if not step_inside:
                optimizer.step()

    # float32 now: rounding of 1e-7 in weights that move by 1.
    assert_centralized(change_of(layer, training), rtol=1e-5)


class SAM(Optimizer):
    """Sharpness-aware minimization around a base optimizer, as it is usually written."""

    def __init__(self, params: Any, base: Any, *, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        for p in parameters:
            self.state[p]["start"] = p.clone()
            p.add_(p.grad * self.defaults["rho"] / norm)

    @torch.no_grad()
    def descend(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["start"])
        self.base.step()

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.climb()
        closure()
        self.descend()
        return loss


def sam_of(layer: nn.Linear) -> SAM:
    sam = SAM(layer.parameters(), SGD, lr=0.01, **DECAYED)
    gcx.torch.centralize(sam.base, layer)
    return sam


@pytest.mark.parametrize("is_by_closure", [False, True])
def test_base_of_sam_takes_a_centralized_step(is_by_closure: bool, layer: nn.Linear) -> None:
    sam = sam_of(layer)

    def training() -> None:
        for step in (sam.climb, sam.descend) * 5:
            backward(layer, sam)
            step()

    def training_by_closure() -> None:
        for _ in range(5):
            sam.step(lambda: backward(layer, sam))

    assert_means_kept(layer, training_by_closure if is_by_closure else training)


def test_sam_climbs_centralized_if_the_closure_centralizes(layer: nn.Linear) -> None:
    sam = SAM(layer.parameters(), SGD, lr=0.01, **DECAYED)
    handle = gcx.torch.centralize(sam.base, layer)
    climbed: list[Tensor] = []

    def closure() -> Tensor:
        climbed.append(layer.weight.detach().clone())
        loss = backward(layer, sam)
        handle.centralize_grads_()
        return loss

    assert_means_kept(layer, lambda: [sam.step(closure) for _ in range(5)])
    for before, after in zip(climbed[::2], climbed[1::2], strict=True):
        assert_centralized(after - before, rtol=RTOL)


def test_outer_optimizer_is_refused(where: Any, layer: nn.Linear) -> None:
    """A loop may call its parts, and never its step."""
    sam = SAM(layer.parameters(), SGD, lr=0.01)
    with pytest.raises(TypeError, match=r"SAM moves the weights by another.*its attribute base"):
        gcx.torch.centralize(sam, layer, where=where)
    for name, container in (("list", [sam.base]), ("dict", {"all": sam.base})):
        outer = SGD(layer.parameters())
        vars(outer)[name] = container
        with pytest.raises(TypeError, match=f"SGD moves the weights by .*its attribute {name}"):
            gcx.torch.centralize(outer, layer, where=where)
    gcx.torch.centralize(sam.base, layer, where=where)  # nothing has been attached


class Stepping(SGD):
    """Steps single parameters, in hooks of backward or in a function in place of its step."""

    @torch.no_grad()
    def step_one(self, parameter: Tensor) -> None:
        parameter.data.sub_(parameter.grad, alpha=0.01)  # type: ignore[arg-type]
        self.state[parameter]["momentum_buffer"] = parameter.grad
        parameter.grad = None

    def step_in_backward(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(self.step_one)

    def replace_step(self) -> None:
        weights = self.param_groups[0]["params"]
        vars(self)["step"] = lambda: [self.step_one(p) for p in weights if p.grad is not None]


@pytest.mark.parametrize("is_removed", [False, True])
@pytest.mark.parametrize("change_loop", [Stepping.step_in_backward, Stepping.replace_step])
def test_steps_that_the_optimizer_does_not_make_are_noticed(
    where: Any, change_loop: Callable[[Stepping], None], is_removed: bool, layer: nn.Linear
) -> None:
    optimizer = Stepping(layer.parameters(), lr=0.01)
    handle = gcx.torch.centralize(optimizer, layer, where=where)
    optimizer.state_dict()
    change_loop(optimizer)
    loss_of(layer).backward()
    if change_loop is Stepping.replace_step:
        optimizer.step()
    notice = handle.remove if is_removed else optimizer.state_dict
    with pytest.warns(UserWarning, match="this Stepping has made steps without") as caught:
        notice()
    assert caught[0].filename == __file__
    notice()  # warns once


def test_states_from_before_are_no_reason_to_warn(where: Any, layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01, momentum=0.9)
    attached(layer, where)
    optimizer.state_dict()
    trained = attached(layer, where, momentum=0.9)
    train(layer, trained)
    handle = gcx.torch.centralize(optimizer, layer, where=where)
    optimizer.load_state_dict(trained.state_dict())
    optimizer.state_dict()
    handle.remove()


def test_closure_that_raises(where: Any, layer: nn.Linear) -> None:
    optimizer = attached(layer, where, **DECAYED)

    def closure() -> None:
        loss_of(layer).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_means_kept(layer, lambda: train(layer, optimizer))


def test_lbfgs_in_two_parts_of_a_training(where: Any, layer: nn.Linear) -> None:
    """Its state is that of all parameters in a row, and a checkpoint of it is taken as it is."""
    model = nn.Sequential(nn.Linear(5, 5).double(), nn.Tanh(), layer)
    optimizer = LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    gcx.torch.centralize(optimizer, model, where=where)
    assert_means_kept(layer, lambda: optimizer.step(lambda: backward(model, optimizer)))
    resumed = LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    gcx.torch.centralize(resumed, model, where=where)
    resumed.load_state_dict(optimizer.state_dict())  # without warning: it has no mean
    assert_means_kept(model[0].weight, lambda: resumed.step(lambda: backward(model, resumed)))


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_optimizers_applied_in_backward(layer: nn.Linear) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    twin = copy.deepcopy(layer)
    plain = attached(twin, **DECAYED)
    _apply_optimizer_in_backward(SGD, layer.parameters(), {"lr": 0.01, **DECAYED})
    for optimizer in layer.weight._in_backward_optimizers:
        gcx.torch.centralize(optimizer, layer)
    for _ in range(5):
        loss_of(layer).backward()
    train(twin, plain)
    assert_same(layer, twin)


def test_optimizers_that_step_in_hooks_of_their_parameters(where: Any, layer: nn.Linear) -> None:
    optimizers = {p: SGD([p], lr=0.01, weight_decay=0.1) for p in layer.parameters()}
    with pytest.raises(ValueError, match="nothing to centralize"):
        gcx.torch.centralize(optimizers[layer.bias], layer)
    centralized = {row.name for row in gcx.torch.plan(layer) if row.layout is not None}
    for name, parameter in layer.named_parameters():
        if name in centralized:
            gcx.torch.centralize(optimizers[parameter], layer, where=where)

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    assert_means_kept(layer, lambda: [loss_of(layer).backward() for _ in range(5)])


def test_complex_weights(where: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, dtype=torch.complex128)
    if where == "gradient":
        optimizer = attached(layer, **DECAYED)
    else:
        optimizer = attached(layer, where, Adam, lr=1e-3, weight_decay=0.1)

    def training() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            layer((X - 0.5) * (1 + 2j)).abs().square().sum().backward()
            optimizer.step()

    change = change_of(layer, training)
    assert change.imag.abs().max() > 1e-5
    assert_centralized(change, rtol=RTOL)


def test_update_by_a_sparse_gradient(layer: nn.Linear) -> None:
    optimizer = SGD([layer.weight], lr=0.1)
    gcx.torch.centralize(optimizer, layer, where="update")
    layer.weight.grad = GRAD.to_sparse()
    assert_means_kept(layer, optimizer.step)


def test_muon_takes_the_centralized_gradient(layer: nn.Linear) -> None:
    """As it would if it were given it by hand; it orthogonalizes in bfloat16 whatever it gets."""
    twin = copy.deepcopy(layer)
    optimizer, plain = Muon([layer.weight]), Muon([twin.weight])
    gcx.torch.centralize(optimizer, layer)
    for _ in range(5):
        backward(layer, optimizer)
        backward(twin, plain)
        twin.weight.grad -= twin.weight.grad.mean(1, keepdim=True)
        optimizer.step()
        plain.step()
    assert torch.equal(layer.weight, twin.weight)


def test_muon_and_adamw_share_a_model(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1).double(), layer)
    of_conv = AdamW(model[0].parameters(), lr=0.01)
    for optimizer in (muon := Muon([layer.weight]), of_conv):
        gcx.torch.centralize(optimizer, model, where="update")

    def training() -> None:
        for _ in range(5):
            model.zero_grad()
            (model(X[:, None]) - 1).square().sum().backward()
            muon.step()
            of_conv.step()

    change = change_of(model[0].weight, lambda: assert_means_kept(layer, training))
    assert_centralized(change, rtol=RTOL)
