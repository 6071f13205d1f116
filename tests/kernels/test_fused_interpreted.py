"""The kernels of gcx.torch.AdamW and SGD, interpreted on a CPU, against the fused steps of torch.

Options are powers of two and their like, which float32 holds as they are: the fused step of torch
on a CPU takes ``1 - lr * weight_decay`` and the corrections of bias from float64, that on CUDA and
the kernels from float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gcx.torch
from gcx.torch import _fused_step
from gcx.torch._fused import SGD, AdamW

BASES: dict[Any, Any] = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}

ADAMW = {"lr": 2**-10, "betas": (1 - 2**-3, 1 - 2**-5), "eps": 2**-27, "weight_decay": 2**-6}
MOMENTUM = {"lr": 2**-10, "momentum": 1 - 2**-3, "weight_decay": 2**-4}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, ADAMW),
    "adamw-maximize": (AdamW, {**ADAMW, "maximize": True, "weight_decay": 0.0}),
    "sgd": (SGD, {"lr": 2**-10}),
    "sgd-decay": (SGD, {"lr": 2**-10, "weight_decay": 2**-4, "maximize": True}),
    "momentum": (SGD, {**MOMENTUM, "dampening": 2**-3}),
    "nesterov": (SGD, {**MOMENTUM, "nesterov": True, "maximize": True}),
}


@pytest.fixture(autouse=True)
def optimizers_on_cpu(on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.setattr(_fused_step, "is_for_kernels", lambda _: True)


class Net(nn.Module):
    """Fan-ins that are rows, columns and runs of columns, beside biases and norms."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, dtype=dtype)
        self.norm = nn.BatchNorm2d(4, dtype=dtype)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2, dtype=dtype)
        self.down = nn.ConvTranspose1d(5, 7, 3, dtype=dtype)
        self.linear = nn.Linear(70, 3, dtype=dtype)


def give_gradients(step: int, *models: nn.Module) -> None:
    """The same ones to all models, with a mean."""
    generator = torch.Generator().manual_seed(step)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(parameters[0].shape, generator=generator) + 0.5
        for p in parameters:
            p.grad = grad.to(p.dtype)


def both(
    kind: Any, options: Any, groups: Any = None, new_model: Callable[[], Any] = Net
) -> Iterator[tuple[Any, Any]]:
    """Ours, and the fused one of torch with the hooks of gcx."""
    model = new_model()
    twin = copy.deepcopy(model)
    groups = groups or (lambda model: model.parameters())
    yield model, kind(groups(model), model=model, **options)
    reference = BASES[kind](groups(twin), fused=True, **options)
    gcx.torch.centralize(reference, twin)
    yield twin, reference


def distance(found: nn.Module, expected: nn.Module) -> float:
    """How far parameters are apart, in units in the last place of the greatest of each tensor."""
    worst = 0.0
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        top = other.detach().abs().max()
        unit = torch.nextafter(top, 2 * top) - top
        worst = max(worst, float((one.detach() - other.detach()).abs().max() / unit))
    return worst


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ConvTranspose1d(5, 7, 3)


@pytest.mark.parametrize(
    ("case", "steps", "new_model"),
    [
        *((case, 6, Net) for case in CASES),
        ("adamw", 100, small_model),
        ("nesterov", 100, small_model),
    ],
)
def test_steps_are_those_of_torch_fused(
    case: str, steps: int, new_model: Callable[[], nn.Module]
) -> None:
    (model, optimizer), (twin, reference) = both(*CASES[case], new_model=new_model)
    start = copy.deepcopy(model)
    for k in range(steps):
        give_gradients(k, model, twin)
        optimizer.step()
        reference.step()
    assert optimizer.fallbacks == [""]
    assert distance(model, twin) <= 2
    assert distance(start, twin) > 1000


def groups_of(model: Net) -> list[dict[str, Any]]:
    vectors = [p for p in model.parameters() if p.ndim == 1]
    rest = [model.up.weight, model.down.weight]
    return [
        {"params": [model.conv.weight], "lr": 2**-8},
        {"params": vectors, "weight_decay": 0.0},
        {"params": rest, "weight_decay": 2**-2},
        {"params": [model.linear.weight], "centralize": False},
    ]


@pytest.mark.parametrize("case", ["adamw", "momentum"])
def test_groups(case: str) -> None:
    (model, optimizer), (twin, reference) = both(*CASES[case], groups_of)
    for k in range(5):
        give_gradients(k, model, twin)
        optimizer.step()
        reference.step()
    assert optimizer.fallbacks == [""] * 4
    assert distance(model, twin) <= 2


@pytest.mark.parametrize("case", ["adamw", "momentum"])
def test_gradients_that_are_not_there_in_each_step(case: str) -> None:
    """Where torch has its fused step of SGD fail if momentum begins at different times."""
    kind, options = CASES[case]
    model, twin = Net(), Net()
    optimizer = kind(model, **options)
    reference = BASES[kind](twin.parameters(), foreach=False, **options)
    gcx.torch.centralize(reference, twin)
    for k in range(7):
        give_gradients(k, model, twin)
        if k % 3 != 1:
            for each in (model, twin):
                each.up.weight.grad = each.linear.bias.grad = None
        optimizer.step()
        reference.step()
    assert distance(model, twin) <= 2
    if kind is AdamW:
        counts = [optimizer.state[p]["step"].item() for p in model.parameters()]
        assert counts == [reference.state[p]["step"].item() for p in twin.parameters()]
        assert {*counts} == {7.0, 2.0}


@pytest.mark.parametrize("case", ["adamw", "momentum"])
def test_checkpoint_goes_on_in_torch_and_back(case: str) -> None:
    (model, optimizer), (twin, reference) = both(*CASES[case])
    for k in range(3):
        give_gradients(k, model)
        optimizer.step()
    plain = BASES[CASES[case][0]](model.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert str(plain.state_dict()) == str(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for group in checkpoint["param_groups"]:
        group["fused"] = True
    reference.load_state_dict(checkpoint)
    for k in range(3, 6):
        give_gradients(k, model, twin)
        optimizer.step()
        reference.step()
    assert distance(model, twin) <= 2
    checkpoint = copy.deepcopy(reference.state_dict())
    for group in checkpoint["param_groups"]:
        group["fused"] = None
    optimizer.load_state_dict(checkpoint)
    model.load_state_dict(twin.state_dict())
    for k in range(6, 9):
        give_gradients(k, model, twin)
        optimizer.step()
        reference.step()
    assert optimizer.fallbacks == [""]
    assert distance(model, twin) <= 2


@pytest.mark.parametrize("case", ["adamw", "momentum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype, case: str) -> None:
    """A step from the same state in float32, rounded, is at most one unit away."""
    kind, options = CASES[case]
    model, wide = Net(dtype), Net()
    optimizer: Any = kind(model, **options)
    reference = BASES[kind](wide.parameters(), foreach=False, **options)
    gcx.torch.centralize(reference, wide)
    for k in range(4):
        give_gradients(k, model)
        for p, w in zip(model.parameters(), wide.parameters(), strict=True):
            w.data, w.grad = p.detach().float(), p.grad.float()
        widen_state(optimizer, reference)
        optimizer.step()
        reference.step()
        for p, w in zip(model.parameters(), wide.parameters(), strict=True):
            pairs = [(p.detach(), w.detach())]
            pairs += [(s, reference.state[w][key]) for key, s in optimizer.state[p].items()]
            for found, expected in pairs:
                assert_one_unit_apart(found, expected)
    assert optimizer.fallbacks == [""]


def widen_state(narrow: Optimizer, wide: Optimizer) -> None:
    for p, w in zip(narrow.param_groups[0]["params"], wide.param_groups[0]["params"], strict=True):
        wide.state[w] = {key: value.float().clone() for key, value in narrow.state[p].items()}


def assert_one_unit_apart(found: Tensor, expected: Tensor) -> None:
    if found.dtype is torch.float32:  # the number of steps
        assert torch.equal(found, expected)
        return
    units = torch.stack([found, expected.to(found.dtype)]).view(torch.int16).int()
    assert (units[0] - units[1]).abs().max() <= 1
