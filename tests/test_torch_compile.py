"""gcx.torch under torch.compile: one break for the hooks, and nothing is compiled twice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, AdamW, Optimizer

import gcx.torch

from torch_training import assert_means_kept, assert_same, attached, keeps_means, loss_of, train

# The compiler uses functions that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")

STEPS = 6


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def new_model() -> nn.Sequential:
    """All the kinds of weights: one axis of fan-in, several, and in groups."""
    torch.manual_seed(0)
    up = nn.ConvTranspose1d(2, 4, 2, groups=2)
    return nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (2, 2)), up, nn.Flatten()).double()


def backward(model: nn.Module, optimizer: Optimizer) -> None:
    """Return no loss, which the compiler would refuse."""
    optimizer.zero_grad()
    loss_of(model).backward()


def compiled_step(model: nn.Module, optimizer: Optimizer, kind: Any) -> Callable[[], object]:
    """Compile the step of the optimizer alone."""
    step = torch.compile(optimizer.step, backend=kind)

    def train_step() -> None:
        backward(model, optimizer)
        step()

    return train_step


def compiled_loop(model: nn.Module, optimizer: Optimizer, kind: Any) -> Callable[[], object]:
    """Compile forward, backward and step."""

    @torch.compile(backend=kind)
    def train_step() -> None:
        backward(model, optimizer)
        optimizer.step()

    return train_step


def compiled_closure(model: nn.Module, optimizer: Optimizer, kind: Any) -> Callable[[], object]:
    """Compile the step, which calls the rest."""
    step = torch.compile(optimizer.step, backend=kind)
    return lambda: step(lambda: backward(model, optimizer))


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.01),
    "momentum": lambda p: SGD(p, lr=0.01, momentum=0.9),
    "sgd-coupled": lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adam-coupled": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01),
}
GRADIENT, UPDATE = {"where": "gradient"}, {"where": "update"}
COUPLED, OF_MOMENTUM = ("sgd-coupled", GRADIENT), ("momentum", UPDATE)
# The hooks around a step are the same, whatever compiled the step: these stand for all of them.
IN_A_LOOP: list[Any] = [COUPLED, ("adamw", GRADIENT), ("adamw", UPDATE)]
CASES = [*IN_A_LOOP, OF_MOMENTUM, ("adam-coupled", GRADIENT)]
CASES.append(("adamw", {**UPDATE, "decay": "outside"}))


def new_pair(optimizer: str, options: dict[str, str]) -> tuple[nn.Module, Optimizer]:
    """With no options, of no hooks."""
    model = new_model()
    made = OPTIMIZERS[optimizer](model.parameters())
    if options:
        gcx.torch.centralize(made, model, **options)
    return model, made


def graphs_and_breaks(compiled: Any, optimizer: str, **options: str) -> list[tuple[int, int]]:
    """Graphs compiled and breaks met until each of the steps."""
    torch.compiler.reset()
    counters.clear()
    counter = CompileCounterWithBackend("eager")
    train_step = compiled(*new_pair(optimizer, options), counter)
    found = []
    for _ in range(STEPS):
        train_step()
        found.append((counter.frame_count, sum(counters["graph_break"].values())))
    return found


of_plain_optimizer = cache(graphs_and_breaks)


@pytest.mark.parametrize(
    ("compiled", "case"), [*product([compiled_step], CASES), *product([compiled_loop], IN_A_LOOP)]
)
def test_graphs(compiled: Any, case: Any) -> None:
    """They are those of the plain optimizer, and so is what is compiled anew in a step."""
    optimizer, options = case
    found = graphs_and_breaks(compiled, optimizer, **options)
    plain = of_plain_optimizer(compiled, optimizer)
    assert found == [(graphs, breaks + 1) for graphs, breaks in plain]


@pytest.mark.parametrize("compiled", [compiled_step, compiled_loop, compiled_closure])
@pytest.mark.parametrize("case", [COUPLED, OF_MOMENTUM])
def test_training_is_that_without_a_compiler(compiled: Any, case: Any) -> None:
    """With SGD: AdamW rounds to float32 in a compiled step."""
    model, optimizer = new_pair(*case)
    twin, plain = new_pair(*case)
    train_step = compiled(model, optimizer, "aot_eager")
    for _ in range(STEPS):
        train_step()
    train(twin, plain, steps=STEPS)
    assert_same(model, twin)


def test_centralize_grads() -> None:
    model, optimizer = new_pair("sgd", {})
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter)
    def train_step() -> None:
        backward(model, optimizer)
        gcx.torch.centralize_grads_(model)
        optimizer.step()

    train_step()
    graphs = counter.frame_count
    assert_means_kept(model[0], lambda: [train_step() for _ in range(STEPS)])
    assert counter.frame_count == graphs


def test_hooks_that_come_and_go(where: Any) -> None:
    """Steps compiled without hooks do not run with them, and the reverse."""
    model, optimizer = new_pair("sgd", {})
    train_step = compiled_step(model, optimizer, "eager")
    assert not keeps_means(model[0], train_step)
    handle = gcx.torch.centralize(optimizer, model, where=where)
    assert keeps_means(model[0], train_step)
    handle.remove()
    assert not keeps_means(model[0], train_step)
    gcx.torch.centralize(optimizer, model, where=where)
    optimizer.param_groups[0]["centralize"] = False
    assert not keeps_means(model[0], train_step)


def test_compiled_model_is_seen_through() -> None:
    """The parameters are those of the model inside, under names with a prefix of torch's."""
    inside = new_model()
    model = torch.compile(inside, backend="eager")
    optimizer = attached(model)
    names = [row.name for row in gcx.torch.centralized(optimizer).plan]
    assert names == [name for name, _ in model.named_parameters()]
    assert_means_kept(inside[0], lambda: train(model, optimizer))


def test_fresh_process() -> None:
    """An import loads no compiler, which takes seconds; torch loads it when something is compiled.

    The compiler looks on while the backend is imported; a warning would be an error.
    """
    script = """
import sys, warnings, torch, gcx.torch
assert "torch._dynamo" not in sys.modules
warnings.simplefilter("error")
program = lambda g: gcx.centralize(g, layout="io...")
grad = torch.arange(24.0).reshape(2, 3, 4)
compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(grad), program(grad))
"""
    run = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, check=False)
    assert run.returncode == 0, run.stderr.decode()
