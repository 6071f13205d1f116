"""gcx.torch under torch.compile: one break for the hooks, and nothing is compiled twice."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, AdamW, Optimizer

import gcx.torch
from gcx.testing import assert_centralized

from torch_training import RTOL, assert_same, change_of, loss_of, train

# The compiler uses what torch has deprecated.
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


def compiled_step(model: nn.Module, optimizer: Optimizer, backend: Any) -> Callable[[], object]:
    """Compile the step of the optimizer alone."""
    step = torch.compile(optimizer.step, backend=backend)

    def train_step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        step()

    return train_step


def compiled_loop(model: nn.Module, optimizer: Optimizer, backend: Any) -> Callable[[], object]:
    """Compile forward, backward and step."""

    @torch.compile(backend=backend)
    def train_step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    return train_step


def compiled_closure(model: nn.Module, optimizer: Optimizer, backend: Any) -> Callable[[], object]:
    """Compile the step, which calls the rest."""

    def closure() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()

    step = torch.compile(optimizer.step, backend=backend)
    return lambda: step(closure)


COMPILED = {"step": compiled_step, "loop": compiled_loop, "closure": compiled_closure}


Case = tuple[Callable[[Any], Optimizer], dict[str, str]]
SGD_CASES: dict[str, Case] = {
    "sgd": (lambda p: SGD(p, lr=0.01), {}),
    "sgd-coupled": (lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1), {}),
    "sgd-update": (lambda p: SGD(p, lr=0.01, momentum=0.9), {"where": "update"}),
}
CASES: dict[str, Case] = {
    **SGD_CASES,
    "adam-coupled": (lambda p: Adam(p, lr=0.01, weight_decay=0.1), {}),
    "adamw": (lambda p: AdamW(p, lr=0.01), {}),
    "adamw-update": (lambda p: AdamW(p, lr=0.01), {"where": "update"}),
    "adamw-outside": (lambda p: AdamW(p, lr=0.01), {"where": "update", "decay": "outside"}),
}

# The hooks around a step are the same, whatever compiled the step: these stand for all of them.
IN_A_LOOP = ("sgd-coupled", "adamw", "adamw-update")


def graphs_and_breaks(compiled: Any, make: Any, **options: Any) -> list[tuple[int, int]]:
    """Graphs compiled and breaks met until each of the steps; with no options, of no hooks."""
    torch.compiler.reset()
    counters.clear()
    model = new_model()
    optimizer = make(model.parameters())
    if options:
        gcx.torch.centralize(optimizer, model, **options)
    counter = CompileCounterWithBackend("eager")
    train_step = compiled(model, optimizer, counter)
    found = []
    for _ in range(STEPS):
        train_step()
        found.append((counter.frame_count, sum(counters["graph_break"].values())))
    return found


@pytest.mark.parametrize(
    ("compiled", "case"),
    [(compiled_step, case) for case in CASES] + [(compiled_loop, case) for case in IN_A_LOOP],
)
def test_graphs(compiled: Any, case: str) -> None:
    """They are those of the plain optimizer, and so is what is compiled anew in a step."""
    make, options = CASES[case]
    plain = graphs_and_breaks(compiled, make)
    found = graphs_and_breaks(compiled, make, **{"where": "gradient", **options})
    assert found == [(graphs, breaks + 1) for graphs, breaks in plain]


@pytest.mark.parametrize(
    ("compiled", "case"),
    [(compiled_step, case) for case in SGD_CASES]
    + [(compiled, "sgd-coupled") for compiled in (compiled_loop, compiled_closure)],
)
def test_training_is_that_without_a_compiler(compiled: Any, case: str) -> None:
    make, options = SGD_CASES[case]
    model = new_model()
    twin = copy.deepcopy(model)
    optimizer, plain = make(model.parameters()), make(twin.parameters())
    gcx.torch.centralize(optimizer, model, **options)
    gcx.torch.centralize(plain, twin, **options)
    train_step = compiled(model, optimizer, "aot_eager")
    for _ in range(STEPS):
        train_step()
    train(twin, plain, steps=STEPS)
    assert_same(model, twin)


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_update_keeps_means(compiled: Any) -> None:
    """With AdamW too, whose compiled step rounds to float32, unlike the other."""
    model = new_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    gcx.torch.centralize(optimizer, model, where="update")
    train_step = compiled(model, optimizer, "aot_eager")
    change = change_of(model[0], lambda: [train_step() for _ in range(STEPS)])
    assert_centralized(change, rtol=RTOL)


def test_centralize_grads() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter)
    def train_step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        gcx.torch.centralize_grads_(model)
        optimizer.step()

    train_step()
    graphs = counter.frame_count
    change = change_of(model[0], lambda: [train_step() for _ in range(STEPS)])
    assert_centralized(change, rtol=RTOL)
    assert counter.frame_count == graphs


def test_hooks_that_come_and_go(where: Any) -> None:
    """What has been compiled without them is not what runs with them, and the reverse."""
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    train_step = compiled_step(model, optimizer, "eager")

    def mean_moves() -> bool:
        change = change_of(model[0].weight, train_step)
        return bool(change.mean(1).abs().max() > RTOL * change.abs().max())

    assert mean_moves()
    handle = gcx.torch.centralize(optimizer, model, where=where)
    assert not mean_moves()
    handle.remove()
    assert mean_moves()
    gcx.torch.centralize(optimizer, model, where=where)
    optimizer.param_groups[0]["centralize"] = False
    assert mean_moves()


def test_layer_added_and_weights_replaced_after_compiling(where: Any) -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    gcx.torch.centralize(optimizer, model, where=where)
    train_step = compiled_step(model, optimizer, "eager")
    train_step()
    model.append(nn.Linear(12, 6).double())
    optimizer.add_param_group({"params": model[-1].parameters(), "weight_decay": 0.2})
    assert_centralized(change_of(model[-1], train_step), rtol=RTOL)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced in the model"):
        train_step()


def test_compiled_model_is_seen_through() -> None:
    """The parameters are those of the model inside, under names with a prefix of torch's."""
    inside = new_model()
    model = torch.compile(inside, backend="eager")
    handle = gcx.torch.centralize(optimizer := SGD(model.parameters(), lr=0.01), model)
    assert [row.name for row in handle.plan] == [name for name, _ in model.named_parameters()]
    assert_centralized(change_of(inside[0], lambda: train(model, optimizer)), rtol=RTOL)


def test_import_loads_no_compiler() -> None:
    """Which takes seconds; torch itself loads it when something is compiled."""
    script = "import sys, torch, gcx.torch; assert 'torch._dynamo' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, check=False)
    assert run.returncode == 0, run.stderr.decode()


def test_a_layout_that_splits_an_axis_is_one_graph() -> None:
    layout = gcx.Layout("(bi)o...", b=2)
    grad = torch.rand(8, 4, 3, dtype=torch.float64)
    compiled = torch.compile(
        lambda g: gcx.centralize(g, layout=layout), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(grad), gcx.centralize(grad, layout=layout))
