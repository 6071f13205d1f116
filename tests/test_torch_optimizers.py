"""gcx.torch.centralize with every optimizer: the corollary, and the steps of the authors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gcx.torch
from gcx import Layout
from gcx.testing import assert_centralized

import torch_training
from sharded_training import DATA, Net, net, whole_weights
from test_optim import OPTIMIZERS, expected, leaves, problem

STEPS = 30
LAYOUTS = {"up.weight": Layout("(bi)o...", b=3)}


@pytest.fixture
def model() -> Net:
    return net(8)


train = partial(torch_training.train, steps=STEPS, x=DATA)


def train_by_closure(model: nn.Module, optimizer: Optimizer) -> None:
    for k in range(STEPS):
        closure = partial(torch_training.backward, model, optimizer, DATA)
        optimizer.step(closure) if k % 2 else optimizer.step(closure=closure)


def assert_means_kept(model: nn.Module, start: dict[str, Tensor]) -> None:
    """Corollary 4.1: training moves every parameter, and no mean over a fan-in."""
    for name, now in whole_weights(model).items():
        change = now - start[name]
        assert change.abs().max() > 1e-5, name
        if name.endswith("weight"):
            # Weights of size 1, changes of 1e-5, float64: 1e-9 is rounding.
            assert_centralized(change, layout=LAYOUTS.get(name, "o..."), rtol=1e-9)


Make = Callable[[Any], Optimizer]
optim = torch.optim

# Linear in the gradient, so that GC on the gradient keeps the means.
LINEAR: dict[str, Make] = {
    "sgd": partial(optim.SGD, lr=0.002),
    "momentum": partial(optim.SGD, lr=0.002, momentum=0.9, dampening=0.1),
    "nesterov": partial(optim.SGD, lr=0.002, momentum=0.9, nesterov=True),
    "decay": partial(optim.SGD, lr=0.002, momentum=0.9, weight_decay=0.1),
    "decay-tensor": partial(optim.SGD, lr=0.002, weight_decay=torch.tensor(0.1).double()),
    "foreach": partial(optim.SGD, lr=0.002, weight_decay=0.1, foreach=True),
    "fused": partial(optim.SGD, lr=0.002, momentum=0.9, weight_decay=0.1, fused=True),
    "lbfgs": partial(optim.LBFGS, lr=0.1, max_iter=3),
    "lbfgs-wolfe": partial(optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
}

# Every optimizer of torch that can train Net, with weight decay where it has any.
ADAPTIVE: dict[str, Make] = {
    name.lower(): partial(kind, weight_decay=0.1)
    for name, kind in torch_training.WITH_DECAY.items()
    if name not in ("SGD", "Muon")
} | {
    "adam-decoupled": partial(optim.Adam, weight_decay=0.1, decoupled_weight_decay=True),
    "adam-foreach": partial(optim.Adam, weight_decay=0.1, foreach=True, amsgrad=True),
    "adam-fused": partial(optim.Adam, weight_decay=0.1, fused=True),
    "rmsprop": partial(optim.RMSprop, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "rprop": optim.Rprop,
}

TRAININGS = {"plain": train, "closure": train_by_closure}


def trainings(kinds: Any) -> list[tuple[str, str]]:
    """All pairs, but for L-BFGS, which cannot do without a closure."""
    return [(k, t) for k in kinds for t in TRAININGS if (k[:5], t) != ("lbfgs", "plain")]


@pytest.mark.parametrize(("kind", "training"), trainings(LINEAR))
def test_gradient_of_linear_optimizers_keeps_means(kind: str, training: str, model: Net) -> None:
    optimizer, start = LINEAR[kind](model.parameters()), whole_weights(model)
    gcx.torch.centralize(optimizer, model)
    TRAININGS[training](model, optimizer)
    assert_means_kept(model, start)


@pytest.mark.parametrize(
    ("kind", "training"),
    [*trainings(["momentum", "lbfgs"]), ("adamw", "closure"), *[(k, "plain") for k in ADAPTIVE]],
)
def test_update_of_any_optimizer_keeps_means(kind: str, training: str, model: Net) -> None:
    optimizer, start = {**LINEAR, **ADAPTIVE}[kind](model.parameters()), whole_weights(model)
    gcx.torch.centralize(optimizer, model, where="update")
    TRAININGS[training](model, optimizer)
    assert_means_kept(model, start)


@pytest.mark.parametrize("name", ["momentum-decay", "nesterov-decay", "adam-decay", "adamw-decay"])
@pytest.mark.parametrize("says_decay", [False, True])
def test_steps_are_those_of_the_authors(name: str, where: Any, says_decay: bool) -> None:
    """As test_optim writes them out."""
    (start, *grads), ours = map(leaves, problem(STEPS)), OPTIMIZERS[name]
    model: Any = nn.ParameterDict({key: torch.tensor(weight) for key, weight in start.items()})
    kind, gc = getattr(optim, type(ours).__name__), {"where", "layouts", "strength", "reproducible"}
    options = {option: value for option, value in vars(ours).items() if option not in gc}
    optimizer = kind(model.parameters(), **options)
    decay: Any = "outside" if (name, where) == ("adamw-decay", "gradient") else "inside"
    overrides: Any = {"conv": "o...", "dense/kernel": "...o", "*": None}
    gcx.torch.centralize(
        optimizer, model, where=where, decay=decay if says_decay else None, overrides=overrides
    )
    for gradient in grads:
        for key, grad in gradient.items():
            model[key].grad = torch.tensor(grad)
        optimizer.step()
    for key, weight in expected(name, where, STEPS).items():
        torch.testing.assert_close(model[key].detach(), torch.tensor(weight), rtol=0, atol=1e-9)


# Optimizers that keep other weights, of torch or of pytorch_optimizer.
BESIDE: dict[str, dict[str, float]] = {
    "ASGD": {"lr": 0.002, "lambd": 0, "t0": 5},
    "ScheduleFreeSGD": {"lr": 0.002},
    "ScheduleFreeAdamW": {"lr": 0.01, "weight_decay": 0.1},
    "ScheduleFreeRAdam": {"lr": 0.01},
    "SPlus": {"lr": 0.1, "ema_rate": 0.9},
}


def make_beside(kind: str, model: nn.Module) -> Any:
    package = optim if hasattr(optim, kind) else pytest.importorskip("pytorch_optimizer")
    return getattr(package, kind)(model.parameters(), **BESIDE[kind])


def evaluate(model: nn.Module, optimizer: Any) -> None:
    """Bring the other weights into the model."""
    if not isinstance(optimizer, optim.ASGD):
        optimizer.eval()
        return
    for parameter in model.parameters():
        parameter.data.copy_(optimizer.state[parameter]["ax"])


@pytest.mark.peers
@pytest.mark.parametrize("kind", BESIDE)
def test_update_keeps_the_means_of_weights_beside(kind: str, model: Net) -> None:
    optimizer, start = make_beside(kind, model), whole_weights(model)
    gcx.torch.centralize(optimizer, model, where="update")
    train(model, optimizer)
    assert_means_kept(model, start)
    evaluate(model, optimizer)
    assert_means_kept(model, start)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("kind", "strength"), [("ASGD", 1.0), ("ASGD", 0.3), ("ScheduleFreeSGD", 1.0)]
)
def test_weights_beside_are_those_of_the_gradient(kind: str, strength: float, model: Net) -> None:
    """Both are linear in the gradient, so that it does not matter where GC goes."""
    other = copy.deepcopy(model)
    for each, where in ((model, "gradient"), (other, "update")):
        optimizer = make_beside(kind, each)
        options: Any = {"where": where, "strength": strength}
        gcx.torch.centralize(optimizer, each, **options)
        train(each, optimizer)
        evaluate(each, optimizer)
    torch.testing.assert_close(whole_weights(other), whole_weights(model), rtol=0, atol=1e-9)


def test_average_kept_by_an_earlier_hook(model: Net) -> None:
    average, start = torch.optim.swa_utils.AveragedModel(model), whole_weights(model)
    optimizer = optim.AdamW(model.parameters(), weight_decay=0.1)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    gcx.torch.centralize(optimizer, model, where="update")
    train(model, optimizer)
    assert_means_kept(average.module, start)


def test_options_of_the_same_name_are_no_average(model: Net) -> None:
    """An optimizer of another kind may keep something else under these names."""
    (weight, *_), own = model.parameters(), torch.ones(())
    optimizer = optim.SGD([{"params": model.parameters(), "lambd": 0.1}], lr=0.1)
    optimizer.state[weight]["ax"] = own
    gcx.torch.centralize(optimizer, model, where="update")
    train(model, optimizer)
    assert optimizer.state[weight]["ax"] is own
    assert own == 1.0


def test_weights_beside_that_are_unknown(model: Net) -> None:
    """It evaluates other weights, which it keeps where nobody finds them."""
    hiding = type("Hiding", (optim.SGD,), {"eval": lambda self: None})
    optimizer = hiding(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"Hiding has an eval\(\).*does not know"):
        gcx.torch.centralize(optimizer, model, where="update")
    train(model, optimizer)
