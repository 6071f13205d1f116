"""The table of docs/where_in_the_step.md: each row trains a layer, and its means do as it says."""

from __future__ import annotations

import ast
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import autocast, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

import gcx.torch

pytestmark = pytest.mark.one_framework

PAGE = Path(__file__).parents[1] / "docs" / "where_in_the_step.md"
CELLS = r"^\|" + r" *(.*?) *\|" * 5 + "$"
ROWS = re.findall(CELLS, PAGE.read_text(encoding="utf-8"), re.MULTILINE)[2:]
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


@pytest.mark.filterwarnings("ignore:the momentum of 1 weights .* was centralized too")
@pytest.mark.parametrize(("optimizer", "options", "loop", "means"), [row[1:] for row in ROWS])
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
