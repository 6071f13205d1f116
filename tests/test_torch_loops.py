"""gcx.torch.centralize in the training loops that there are, whatever memory gradients share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

import gcx.torch
from benchmarks.frames import frames_of_a_step
from gcx.testing import assert_centralized

from torch_training import (
    DECAYED,
    GRAD,
    RTOL,
    X,
    assert_means_kept,
    attached,
    backward,
    change_of,
    deeper,
    loss_of,
    new_layer,
    train,
)


def go_on_with_the_gradient(layer: nn.Linear, optimizer: Optimizer) -> None:
    """Later steps centralize what is centralized, and the decay of new weights."""
    loss_of(layer).backward()
    for _ in range(3):
        optimizer.step()


def step_by_a_gradient_with_a_graph(layer: nn.Linear, optimizer: Optimizer) -> None:
    loss_of(layer).backward(create_graph=True)
    assert layer.weight.grad.requires_grad
    optimizer.step()


def step_in_backward(layer: nn.Linear, optimizer: Optimizer) -> None:
    layer.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    for _ in range(3):
        backward(layer, optimizer)


LOOPS = [go_on_with_the_gradient, step_by_a_gradient_with_a_graph, step_in_backward]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_that_keep_the_means(where: Any, loop: Any, layer: nn.Linear) -> None:
    optimizer = attached(layer, where, **DECAYED)
    assert_means_kept(layer, lambda: loop(layer, optimizer))


def test_centralize_grads_touches_nothing_else(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), layer, nn.Linear(5, 3))
    layer.weight.grad, layer.bias.grad = GRAD.clone(), torch.ones_like(layer.bias)
    model[0].weight.grad = conv = torch.rand(3, 2, 2)
    weights, kept = [p.detach().clone() for p in model.parameters()], conv.clone()
    gcx.torch.centralize_grads_(model, overrides={"0.*": None})
    assert torch.equal(conv, kept)
    torch.testing.assert_close(layer.weight.grad, GRAD - GRAD.mean(1, keepdim=True))
    assert torch.equal(layer.bias.grad, torch.ones_like(layer.bias))
    assert model[2].weight.grad is None
    assert all(map(torch.equal, weights, model.parameters()))
    gcx.torch.centralize_grads_(model, layers="conv")
    torch.testing.assert_close(conv, kept - kept.mean((1, 2), keepdim=True))


def test_centralize_grads_with_nothing_to_do(layer: nn.Linear) -> None:
    for options in ({}, {"layers": "conv"}):
        with pytest.raises(ValueError, match=r"no gradient to centralize; call backward\(\) first"):
            gcx.torch.centralize_grads_(layer, **options)
        loss_of(layer).backward()


@pytest.mark.parametrize("by_step", [False, True])
def test_sparse_gradient_of_a_weight(by_step: bool, layer: nn.Linear) -> None:
    """An error before anything is changed; the update asks for none."""
    model = nn.Sequential(nn.Linear(5, 3).double(), layer)
    optimizer = attached(model)
    model[0].weight.grad, layer.weight.grad = GRAD.clone(), GRAD.to_sparse()
    with pytest.raises(TypeError, match=r"1\.weight has a gradient of layout torch\.sparse_coo"):
        optimizer.step() if by_step else gcx.torch.centralize_grads_(model)
    assert torch.equal(model[0].weight.grad, GRAD)
    gcx.torch.centralized(optimizer).remove()
    gcx.torch.centralize(optimizer, model, where="update")
    assert_means_kept(layer, optimizer.step)


def test_steps_inside_of_autocast(where: Any) -> None:
    layer = new_layer().float()
    optimizer = attached(layer, where, **DECAYED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(X.float()).dtype == torch.bfloat16
        change = change_of(layer, lambda: train(layer, optimizer, x=X.float()))
    # float32 now: rounding of 1e-7 in weights that move by 1.
    assert_centralized(change, rtol=1e-5)


def test_outer_optimizer_is_refused(where: Any, layer: nn.Linear) -> None:
    """A loop may call its parts, and never its step."""
    inner = SGD(layer.parameters(), lr=0.01)
    for name, held in (("base", inner), ("list", [inner]), ("dict", {"all": inner})):
        outer = SGD(layer.parameters())
        vars(outer)[name] = held
        with pytest.raises(TypeError, match=f"SGD moves the weights by .*its attribute {name}"):
            gcx.torch.centralize(outer, layer, where=where)
    gcx.torch.centralize(inner, layer, where=where)  # nothing has been attached


class Stepping(SGD):
    """Steps single parameters, in hooks of backward or in a function in place of its step."""

    @torch.no_grad()
    def step_one(self, parameter: Any) -> None:
        if parameter.grad is not None:
            parameter.sub_(parameter.grad, alpha=0.01)
            self.state[parameter]["momentum_buffer"] = parameter.grad
            parameter.grad = None

    def step_in_backward(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(self.step_one)

    def replace_step(self) -> None:
        vars(self)["step"] = lambda: [*map(self.step_one, self.param_groups[0]["params"])]


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
    if "step" in vars(optimizer):
        optimizer.step()
    notice = handle.remove if is_removed else optimizer.state_dict
    with pytest.warns(UserWarning, match="this Stepping has made steps without") as caught:
        notice()
    assert caught[0].filename == __file__
    notice()  # warns once


def test_states_from_before_are_no_reason_to_warn(where: Any, layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01, momentum=0.9)
    trained = attached(layer, where, momentum=0.9)
    train(layer, trained)
    handle = gcx.torch.centralize(optimizer, layer, where=where)
    optimizer.load_state_dict(trained.state_dict())
    optimizer.state_dict()
    handle.remove()


def test_lbfgs_in_two_parts_of_a_training(where: Any, layer: nn.Linear) -> None:
    """Its memory may be from before, and is left alone."""
    model = deeper(layer)
    options: Any = {"max_iter": 4, "line_search_fn": "strong_wolfe", "lr": 1}
    optimizer = attached(model, where, LBFGS, **options)
    assert_means_kept(layer, partial(optimizer.step, partial(backward, model, optimizer)))
    state, optimizer = optimizer.state_dict(), attached(model, where, LBFGS, **options)
    warns = pytest.warns(UserWarning, match=r"momentum of 2 weights \(0\.weight, .* without a mean")
    with warns if where == "gradient" else nullcontext():
        optimizer.load_state_dict(state)
    assert_means_kept(model[0], partial(optimizer.step, partial(backward, model, optimizer)))


def test_complex_weights(where: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, dtype=torch.complex128)
    options: Any = DECAYED if where == "gradient" else {"kind": Adam, "weight_decay": 0.1}
    optimizer = attached(layer, where, lr=1e-3, **options)
    change = change_of(layer, lambda: train(layer, optimizer, x=(X - 0.5) * (1 + 2j)))
    assert change.imag.abs().max() > 1e-5
    assert_centralized(change, rtol=RTOL)


def test_conjugate_gradient() -> None:
    layer = nn.Linear(5, 3, bias=False, dtype=torch.complex64)
    optimizer = attached(layer, lr=1.0)
    for _ in range(2):
        layer.weight.grad = torch.randn(3, 5, dtype=torch.complex64).conj()
        assert_centralized(change_of(layer, optimizer.step), rtol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_gradients_that_come_and_go(weight_decay: float) -> None:
    """As those of experts, in few sets that come again and many that do not."""
    draw = torch.Generator().manual_seed(0)
    model = nn.ModuleList(
        [nn.Linear(4 + k, 3, bias=False) for k in range(7)]
        + [nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.Linear(600, 400, bias=False)]
    )
    optimizer = SGD(model.parameters(), 0.5, weight_decay=weight_decay)
    gcx.torch.centralize(optimizer, model)
    for step in range(100):
        expected = []
        dtype = torch.float64 if step == 50 else torch.float32
        for k, p in enumerate(model.to(dtype).parameters()):
            is_there = step % 3 or torch.rand((), generator=draw) < 0.5 + k / 100
            p.grad = torch.rand(p.shape, generator=draw, dtype=dtype) if is_there else None
            view, axes = ((2, 2, 3, 3), (1, 3)) if p.ndim == 3 else (p.shape, (1,))
            change = 0 * p if p.grad is None else p.grad + weight_decay * p
            change = change.detach().view(view)
            change = (change - change.mean(axes, keepdim=True)).view(p.shape)
            expected.append(p.detach() - 0.5 * change)
        optimizer.step()
        torch.testing.assert_close([*model.state_dict().values()], expected)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_step_calls_few_functions_in_few_files(options: dict[str, float]) -> None:
    found = frames_of_a_step(**options)
    assert len(found.calls) <= 30
    assert len(found.files) <= 6
    assert frames_of_a_step(layers=40, **options) == found


class Named(Tensor):
    """A subclass of Tensor."""


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("layers", [(nn.Linear, nn.Linear), (nn.Linear, nn.Embedding)], ids=str)
@pytest.mark.parametrize(
    "shared",
    [
        lambda g: (g[:2], g[:2]),
        lambda g: (g[:2], g[1:3]),
        lambda g: (g[:2].as_subclass(Named),) * 2,
        lambda g: (g[:3:2], g[2:]),
        lambda g: (torch.view_as_complex(g.view(2, 2, 2)), g.view(2, 2, 2)[..., 1]),
    ],
    ids=["one", "overlapping", "subclass", "reaching", "imaginary part"],
)
def test_each_weight_gets_its_own_share_of_a_gradient(
    shared: Any, layers: tuple[Any, Any], weight_decay: float
) -> None:
    grads, decayed = shared(torch.arange(8.0).view(4, 2) ** 2), []
    model: Any = nn.ModuleList(
        [kind(2, 2, dtype=grad.dtype) for kind, grad in zip(layers, grads, strict=True)]
    )
    for layer, grad in zip(model, grads, strict=True):
        layer.weight.grad = grad
        expected = grad + weight_decay * layer.weight.detach()
        if isinstance(layer, nn.Linear):
            expected = expected - expected.mean(1, keepdim=True)
        decayed.append(layer.weight.detach() - expected)
    optimizer = SGD(model.parameters(), 1.0, weight_decay=weight_decay)
    gcx.torch.centralize(optimizer, model)
    optimizer.step()
    for layer, expected in zip(model, decayed, strict=True):
        torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("is_step", [True, False], ids=["step", "method"])
def test_gradient_of_a_parameter_of_another_optimizer_stays(is_step: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False))
    optimizer = SGD(model[0].parameters(), 1.0, weight_decay=0.5)
    handle = gcx.torch.centralize(optimizer, model)
    model[0].weight.grad = model[1].weight.grad = torch.tensor([[1.0, 3.0]])
    if is_step:
        optimizer.step()
    else:
        handle.centralize_grads_()
        assert torch.equal(model[0].weight.grad, torch.tensor([[-1.0, 1.0]]))
    assert torch.equal(model[1].weight.grad, torch.tensor([[1.0, 3.0]]))


def test_gradient_in_the_memory_of_its_weight() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = layer.weight.detach()
    weight = layer.weight.detach().clone()
    optimizer = SGD(layer.parameters(), 0.5)
    gcx.torch.centralize(optimizer, layer)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * (weight - weight.mean()))
