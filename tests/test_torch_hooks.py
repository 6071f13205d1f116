"""How gcx.torch.centralize lives with an optimizer: attaching, stepping, leaving, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import gcx.torch
from gcx.testing import assert_centralized

# Weights of size 1 in float64 after some steps: means are kept to rounding.
RTOL = 1e-9
X = torch.rand(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GRAD = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def loss_of(layer: nn.Module) -> Tensor:
    return (layer(X) - 1).square().sum()


def train(layer: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(layer).backward()
        optimizer.step()


def change_of(layer: nn.Linear, training: Callable[[], None]) -> Tensor:
    start = layer.weight.detach().clone()
    training()
    change = layer.weight.detach() - start
    assert change.abs().max() > 1e-5
    return change


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


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_remove_gives_plain_training_back_bit_for_bit(where: Any, layer: nn.Linear) -> None:
    twin = copy.deepcopy(layer)
    plain = Adam(twin.parameters(), weight_decay=0.1)
    optimizer = Adam(layer.parameters(), weight_decay=0.1)
    handle = gcx.torch.centralize(optimizer, layer, where=where)
    handle.remove()
    handle.remove()
    train(layer, optimizer)
    train(twin, plain)
    assert torch.equal(layer.weight, twin.weight)
    assert torch.equal(layer.bias, twin.bias)
    with pytest.warns(UserWarning, match="momentum"):
        gcx.torch.centralize(optimizer, layer)  # which a second handle would refuse


@pytest.mark.parametrize("where", ["gradient", "update"])
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
    if kind is SGD:
        assert_centralized(change_of(layer, lambda: train(layer, optimizer)), rtol=RTOL)


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


def test_momentum_of_what_is_no_gradient_stays(layer: nn.Linear) -> None:
    optimizer = RMSprop(layer.parameters(), momentum=0.9)
    train(layer, optimizer)
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    before = momentum.clone()
    gcx.torch.centralize(optimizer, layer)
    assert torch.equal(momentum, before)


def test_momentum_of_another_shape_is_an_error(layer: nn.Linear) -> None:
    optimizer = Adam(layer.parameters())
    optimizer.state[layer.weight]["exp_avg"] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"momentum of weight has shape \(2, 5\).*'update'"):
        gcx.torch.centralize(optimizer, layer)


# Parameters that come, go, or have no gradient


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_layer_added_later_is_covered_with_its_own_decay(where: Any, layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(5, 5).double())
    optimizer = SGD(model.parameters(), lr=0.01, weight_decay=0.3)
    handle = gcx.torch.centralize(optimizer, model, where=where)
    model.append(layer)
    optimizer.add_param_group({"params": layer.parameters(), "weight_decay": 0.1})
    start = model[0].weight.detach().clone()
    assert_centralized(change_of(layer, lambda: train(model, optimizer)), rtol=RTOL)
    assert_centralized(model[0].weight.detach() - start, rtol=RTOL)
    assert [row.name for row in handle.plan] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("where", ["gradient", "update"])
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
    optimizer = SGD(layer.parameters(), lr=1.0)
    gcx.torch.centralize(optimizer, layer)
    row = torch.arange(5.0, dtype=torch.float64)
    layer.weight.grad = row.expand(3, 5)
    change = change_of(layer, optimizer.step)
    torch.testing.assert_close(change, (2 - row).expand(3, 5))
    assert torch.equal(row, torch.arange(5.0, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradient_that_has_a_graph(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01)
    gcx.torch.centralize(optimizer, layer)
    loss_of(layer).backward(create_graph=True)
    assert layer.weight.grad.requires_grad
    assert_centralized(change_of(layer, optimizer.step), rtol=RTOL)


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
    optimizer = Own(layer.parameters())
    gcx.torch.centralize(optimizer, layer)
    loss_of(layer).backward()
    change = change_of(layer, lambda: optimizer.step(lambda: None))
    assert_centralized(change, rtol=RTOL)


def test_closure_that_adds_to_a_gradient(layer: nn.Linear) -> None:
    """The part from before is centralized first, and again with the rest."""
    twin = copy.deepcopy(layer)
    optimizer, other = (SGD(m.parameters(), lr=0.01, weight_decay=0.1) for m in (layer, twin))
    gcx.torch.centralize(optimizer, layer)
    gcx.torch.centralize(other, twin)
    loss_of(layer).backward()
    optimizer.step(lambda: loss_of(layer).backward())
    loss_of(twin).backward()
    loss_of(twin).backward()
    other.step()
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-14)


def test_closure_gives_its_loss_and_runs_with_gradients_on(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01)
    gcx.torch.centralize(optimizer, layer)

    def closure() -> float:
        assert torch.is_grad_enabled()
        loss_of(layer).backward()
        return 7.0

    assert optimizer.step(closure) == optimizer.step(closure=closure) == 7.0
    assert optimizer.step(None) is None


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_step_that_calls_the_step_of_its_base(where: Any, layer: nn.Linear) -> None:
    twin = copy.deepcopy(layer)
    nested = Inherited(layer.parameters(), weight_decay=0.1)
    plain = Adam(twin.parameters(), weight_decay=0.1)
    gcx.torch.centralize(nested, layer, where=where)
    gcx.torch.centralize(plain, twin, where=where)
    calls: list[object] = []
    nested.register_step_pre_hook(lambda *args: calls.append(args))
    train(layer, nested, steps=5)
    train(twin, plain, steps=5)
    assert len(calls) == 10  # or there is nothing nested here
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-14)


def test_step_that_raises_leaves_the_next_ones_right(layer: nn.Linear) -> None:
    optimizer = Own(layer.parameters())
    gcx.torch.centralize(optimizer, layer, where="update")
    train(layer, optimizer)
    optimizer.fails = True
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        with torch.no_grad():
            layer.weight += 1  # a new start, which no old mean may undo
    optimizer.fails = False
    assert_centralized(change_of(layer, lambda: train(layer, optimizer)), rtol=RTOL)


def test_learning_rate_scheduler(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    gcx.torch.centralize(optimizer, layer)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=6)

    def training() -> None:
        for _ in range(5):
            train(layer, optimizer, steps=1)
            scheduler.step()

    assert_centralized(change_of(layer, training), rtol=RTOL)


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
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.125, "maximize": maximize}
    optimizer = SGD(layer.parameters(), fused=fused, **options)
    plain = SGD(twin.parameters(), **options)
    gcx.torch.centralize(optimizer, layer)
    gcx.torch.centralize(plain, twin)
    change = change_of(layer, lambda: train_scaled(layer, optimizer, unscale=unscale))
    assert_centralized(change, rtol=RTOL)
    train(twin, plain)
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"where": "update"}, {"where": "update", "decay": "outside"}]
)
@pytest.mark.parametrize("fused", [False, True])
def test_step_skipped_for_infinity_moves_nothing(
    fused: bool, options: Any, layer: nn.Linear
) -> None:
    optimizer = AdamW(layer.parameters(), weight_decay=0.1, fused=fused)
    gcx.torch.centralize(optimizer, layer, **options)
    before = layer.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.inf * loss_of(layer)).backward()
    scaler.step(optimizer)
    assert torch.equal(layer.weight, before)


# Weight decay


WITH_DECAY = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and "weight_decay" in signature(kind).parameters
]


@pytest.mark.parametrize("kind", WITH_DECAY)
def test_decay_is_placed_as_every_optimizer_of_torch_applies_it(kind: Any) -> None:
    """By experiment: coupled decay does what the gradient does that has it added by hand."""
    layer = nn.Linear(5, 3, bias=False).double()
    start = layer.weight.detach().clone()

    def stepped(weight_decay: float, grad: Tensor) -> Tensor:
        twin = copy.deepcopy(layer)
        twin.weight.grad = grad.clone()
        kind(twin.parameters(), lr=0.01, weight_decay=weight_decay).step()
        return twin.weight.detach()

    is_coupled = torch.allclose(stepped(0.1, GRAD), stepped(0.0, GRAD + 0.1 * start))

    optimizer = kind(layer.parameters(), lr=0.01, weight_decay=0.1)
    gcx.torch.centralize(optimizer, layer)
    layer.weight.grad = GRAD.clone()
    optimizer.step()
    subtracted = GRAD + 0.1 * start if is_coupled else GRAD
    torch.testing.assert_close(layer.weight.grad, GRAD - subtracted.mean(1, keepdim=True))


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
    class Shrinking(SGD):
        def step(self, closure: Any = None) -> Any:
            raise NotImplementedError

    class Renamed(SGD):
        pass

    gcx.torch.centralize(Renamed(layer.parameters(), weight_decay=0.1), layer)
    with pytest.raises(ValueError, match="does Shrinking add"):
        gcx.torch.centralize(Shrinking(layer.parameters(), weight_decay=0.1), layer)


def test_decay_that_does_not_fit(layer: nn.Linear) -> None:
    adamw, sgd = AdamW(layer.parameters()), SGD(layer.parameters())
    with pytest.raises(ValueError, match=r"AdamW shrinks the weights apart.*where='update'"):
        gcx.torch.centralize(adamw, layer, decay="inside")
    with pytest.raises(ValueError, match=r"SGD adds weight_decay.*where='gradient'"):
        gcx.torch.centralize(sgd, layer, where="update", decay="outside")


# Errors


def test_choices(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters())
    with pytest.raises(ValueError, match="where is one of 'gradient', 'update', not 'weight'"):
        gcx.torch.centralize(optimizer, layer, where="weight")
    with pytest.raises(ValueError, match="decay is one of None, 'inside', 'outside', not True"):
        gcx.torch.centralize(optimizer, layer, decay=True)


def test_not_an_optimizer(layer: nn.Linear) -> None:
    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    wrapper = Wrapper(SGD(layer.parameters()))
    scheduler = torch.optim.lr_scheduler.ConstantLR(wrapper.optimizer)
    for other in (Wrapper(layer), scheduler):
        with pytest.raises(TypeError, match=r"not a (Wrapper|ConstantLR).*\.optimizer"):
            gcx.torch.centralize(other, layer)
    with pytest.raises(TypeError, match="not a list"):
        gcx.torch.centralize([layer.weight], layer)
    with pytest.raises(TypeError, match=r"model is a torch\.nn\.Module, not a generator"):
        gcx.torch.centralize(wrapper.optimizer, layer.parameters())


def test_attaching_twice(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters())
    gcx.torch.centralize(optimizer, layer)
    with pytest.raises(ValueError, match=r"this SGD has Gradient Centralization already"):
        gcx.torch.centralize(optimizer, layer, where="update")


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


def test_sparse_gradient_of_a_weight(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Linear(5, 3).double(), layer)
    optimizer = SGD(model.parameters())
    gcx.torch.centralize(optimizer, model)
    model[0].weight.grad, layer.weight.grad = GRAD.clone(), GRAD.to_sparse()
    with pytest.raises(TypeError, match=r"1\.weight has a gradient of layout torch\.sparse_coo"):
        optimizer.step()
    assert torch.equal(model[0].weight.grad, GRAD)


def test_sparse_gradient_of_an_embedding_is_nobodys_business(layer: nn.Linear) -> None:
    model = nn.Sequential(nn.Embedding(7, 5, sparse=True).double(), layer)
    optimizer = SGD(model.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, model)
    model(torch.tensor([1, 2])).square().sum().backward()
    assert_centralized(change_of(layer, optimizer.step), rtol=RTOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_update_of_low_precision_weights_warns(dtype: torch.dtype, layer: nn.Linear) -> None:
    layer = layer.to(dtype)
    with pytest.warns(UserWarning, match=f"weight is {dtype}.*where='gradient'") as caught:
        gcx.torch.centralize(SGD(layer.parameters()), layer, where="update")
    assert caught[0].filename == __file__
