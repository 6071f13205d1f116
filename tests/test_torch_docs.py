"""Tables of docs/: where GC stands in a step, and the messages that users meet."""

from __future__ import annotations

import ast
import copy
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import autocast, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Optimizer

import gcx
import gcx.torch

import torch_training

pytestmark = pytest.mark.one_framework

DOCS = Path(__file__).parents[1] / "docs"
STEPS = 20
RATES = {"SGD": 0.1, "Adam": 0.01, "AdamW": 0.01}

# By the text of the table.
CLIPS = {
    "`clip_grad_norm_`": lambda layer: clip_grad_norm_(layer.parameters(), 0.5),
    "`clip_grad_value_`": lambda layer: clip_grad_value_(layer.parameters(), 0.02),
}
IN_BACKWARD = "`centralize_in_backward`, then "
LOOPS = {
    *("", *CLIPS, *(IN_BACKWARD + name for name in CLIPS)),
    *("`autocast`", "`autocast` and `GradScaler`", "`model.bfloat16()`"),
    *("GC begins after some steps", "4 backward passes a step"),
}


def rows(page: str, columns: int) -> list[tuple[str, ...]]:
    """Rows below the head of the table that has so many columns."""
    cells = r"^\|" + r" *(.*?) *\|" * columns + "$"
    return re.findall(cells, (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)[2:]


@pytest.mark.filterwarnings("ignore:the momentum of 1 weights .* was centralized too")
@pytest.mark.parametrize(
    ("optimizer", "options", "loop", "means"), [row[1:] for row in rows("where_in_the_step.md", 5)]
)
def test_means_do_as_the_table_says(optimizer: str, options: str, loop: str, means: str) -> None:
    assert loop in LOOPS
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, dtype=torch.bfloat16 if "bfloat16" in loop else torch.float32)
    kind, numbers = parse(optimizer.strip("`"))
    optim = getattr(torch.optim, kind)(layer.parameters(), lr=RATES[kind], **numbers)
    if "begins" in loop:
        train(layer, optim, loop)
    if IN_BACKWARD in loop:
        gcx.torch.centralize_in_backward(layer)
    else:
        gcx.torch.centralize(optim, layer, **parse(f"of({options.strip('`')})")[1])
    start = layer.weight.detach().double()
    train(layer, optim, loop)
    end = layer.weight.detach().double()
    assert (end - start).abs().max() > 1e-3
    factor = (1 - RATES[kind] * numbers["weight_decay"]) ** STEPS if means == "shrink" else 1
    off = (end.mean(1) - factor * start.mean(1)).abs().max()
    assert means in {"stay", "shrink", "move"}
    assert off > 1e-4 if means == "move" else off < 1e-6


def train(layer: nn.Linear, optimizer: Optimizer, loop: str) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled="GradScaler" in loop)
    precision = autocast("cpu", torch.bfloat16) if "autocast" in loop else nullcontext()
    for _ in range(STEPS):
        optimizer.zero_grad()
        for batch in torch.randn(4 if "4 backward" in loop else 1, 16, 8, dtype=layer.weight.dtype):
            with precision:
                loss = (layer(batch) - 1).square().mean()
            scaler.scale(loss).backward()
        if clip := CLIPS.get(loop.removeprefix(IN_BACKWARD)):
            clip(layer)
        scaler.step(optimizer)
        scaler.update()


def parse(call: str) -> tuple[str, dict[str, Any]]:
    """Name and keywords of a call in the table."""
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}


def test_wrappers_take_a_class_that_centralizes() -> None:
    class Around(Optimizer):
        def __init__(self, params: Any, base: Any, **options: Any) -> None:
            super().__init__(params, options)
            self.base_optimizer = base(self.param_groups, **options)

        def step(self, closure: Any = None) -> None:
            self.base_optimizer.step(closure)

    class Centralized(SGD):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            gcx.torch.centralize(self, model)

    model = torch_training.new_layer()
    optimizer = Around(model.parameters(), Centralized, lr=0.01, **torch_training.DECAYED)
    torch_training.assert_means_kept(model, lambda: torch_training.train(model, optimizer))


class AdamP(Optimizer):
    """From another package, as far as gcx can tell."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1})

    def step(self, closure: Any = None) -> None: ...


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))


def attach(model: nn.Module, kind: Callable[..., Optimizer] = SGD) -> Optimizer:
    optimizer = kind(model.parameters(), lr=0.1)
    gcx.torch.centralize(optimizer, model)
    return optimizer


def replace_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    optimizer = attach(model)
    model[0] = nn.Linear(8, 4)
    optimizer.step()


def begin_after_steps() -> None:
    layer = nn.Linear(8, 4)
    optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9)
    train(layer, optimizer, "")
    gcx.torch.centralize(optimizer, layer)


LAYER = nn.Linear(8, 4)
# By the text of the table.
MISTAKES: dict[str, Callable[[], object]] = {
    "`unknown` in the plan": lambda: gcx.torch.plan(Own()),
    "`there is nothing to centralize`": lambda: attach(nn.LayerNorm(4)),
    "`has Gradient Centralization already`": lambda: gcx.torch.centralize(attach(LAYER), LAYER),
    "`that is not in the model`": lambda: gcx.torch.centralize(
        SGD(LAYER.parameters()), nn.Linear(8, 4)
    ),
    "`was replaced in the model`": replace_layer,
    "`does AdamP add weight_decay * w to the gradient?`": lambda: attach(nn.Linear(8, 4), AdamP),
    "`hooks are not copied`": lambda: copy.deepcopy(attach(LAYER)),
    "`it was centralized too`": begin_after_steps,
    "`expected an array`": lambda: gcx.centralize([[1.0, 2.0]]),
    "`expected a real or complex floating dtype`": lambda: gcx.centralize(torch.ones(2, 3).int()),
}


@pytest.mark.parametrize("text", [row[0] for row in rows("is_it_on.md", 3)])
def test_gcx_says_what_the_table_quotes(text: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said = str(MISTAKES[text]())
        except (TypeError, ValueError, RuntimeError) as error:
            said = str(error)
    assert text.split("`")[1] in "\n".join([said, *(str(warning.message) for warning in caught)])
