"""gcx.torch.AdamW and SGD with kernels make the steps of torch's fused optimizers.

Options are powers of two and their like, which float32 holds as they are. On a CPU, torch's fused
step takes ``1 - lr * weight_decay`` and the corrections of bias from float64; on CUDA it takes them
from float32, as the kernels do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from gcx.backends import _torch_cuda
from gcx.backends.cuda.launcher import Schedule
from gcx.torch._fused import SGD, AdamW

from torch_fused_steps import (
    CASES,
    STEPS,
    TYPICAL,
    Net,
    Pair,
    assert_close,
    assert_close_states,
    both,
    hooked,
    launched,
    make_device,  # noqa: F401 - for the fixture `device`
    new_net,
    step,
    step_by_closure,
    train,
)
from torch_kernels import (
    Device,
    assert_equal,
    distance,
    everywhere,
    give_gradients,
)


def assert_steps_of_torch(
    device: Device, ours: Pair, reference: Pair, steps: int, training: Any = step
) -> None:
    start = copy.deepcopy(ours[0])
    train(range(steps), ours, reference, training=training)
    assert {*ours[1].fallbacks} == {""}
    assert distance(ours[0], reference[0]) <= 2
    assert distance(start, reference[0]) > 1000
    if device.type == "cpu":  # there is no step that is counted on a GPU
        assert_close_states(ours[1], reference[1])


@everywhere
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [step, step_by_closure])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch_fused(
    case: str, training: Any, memory_format: Any, device: Device
) -> None:
    ours, reference = both(case, new_net(device, memory_format=memory_format), fused=True)
    steps = 100 if device.type == "cuda" else STEPS
    assert_steps_of_torch(device, ours, reference, steps, training)
    assert launched(device) == steps * len([*ours[0].parameters()])
    assert "step of group 0: in one launch" in repr(ours[1])


def long_net(length: int) -> nn.Module:
    """Rows of this length, and columns that no tile holds."""
    return nn.ModuleList([nn.Linear(length, 2), nn.ConvTranspose1d(300, 40, 1)])


OTHER_NETS: dict[str, Callable[[], nn.Module]] = {
    "small": lambda: nn.ConvTranspose1d(5, 7, 1),
    "long": lambda: long_net(5000),
    "longer": lambda: long_net(9000),  # no thread block holds a row
    "with float64": lambda: Net(torch.float64),
}


@pytest.mark.parametrize(
    ("case", "net", "steps"),
    [
        *((case, net, 5) for net in ("long", "with float64") for case in CASES),
        *((case, "longer", 5) for case in CASES if CASES[case][0] is SGD),
        *((case, "small", 100) for case in ("adamw", "nesterov")),
    ],
)
def test_steps_of_other_nets(case: str, net: str, steps: int, device: Device) -> None:
    torch.manual_seed(0)
    assert_steps_of_torch(device, *both(case, OTHER_NETS[net](), fused=True), steps)


def groups_of(model: Any) -> list[dict[str, Any]]:
    vectors = [p for p in model.parameters() if p.ndim == 1]
    rest = [model.up.weight, model.down.weight]
    return [
        {"params": [model.conv.weight], "lr": 2**-8},
        {"params": vectors, "weight_decay": 0.0},
        {"params": rest, "weight_decay": 2**-2},
        {"params": [model.head.weight], "centralize": False},
    ]


@pytest.mark.parametrize("case", TYPICAL)
def test_one_launch_for_each_kind_of_kernel_in_a_group_and_dtype(case: str, device: Device) -> None:
    ours, reference = both(case, Net(torch.float64), groups_of, fused=True)
    assert_steps_of_torch(device, ours, reference, steps=5)
    rule = "AdamW" if case == "adamw" else "SgdMomentumRate"
    of_vectors = rule.removesuffix("Rate")
    vectors = [(of_vectors, 5), (of_vectors, 1)]  # in float32 and float64
    assert device.runs == [(rule, 1), *vectors, (rule, 2), (rule, 1)] * 5


@pytest.mark.parametrize("options", [{}, {"lr": 1e-5, "betas": (0.95, 0.9999), "maximize": True}])
def test_numbers_of_float64_are_not_rounded(options: Any, device: Device) -> None:
    model = Net(torch.float64)
    twin = copy.deepcopy(model)
    optimizer, reference = AdamW(model, **options), hooked(twin, AdamW, fused=True, **options)
    train(range(3), (model, optimizer), (twin, reference))
    assert optimizer.fallbacks == [""]
    assert distance(model.head, twin.head) <= 8  # rounded to float32, millions


@pytest.mark.parametrize("case", TYPICAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype, case: str, device: Device) -> None:
    """A step from the same state in float32, rounded, is at most one unit away."""
    kind, options = CASES[case]
    model, wide = Net().to(dtype), Net()
    optimizer: Any = kind(model, **options)
    reference = hooked(wide, kind, foreach=False, **options)
    pairs = [*zip(model.parameters(), wide.parameters(), strict=True)]
    for k in range(4):
        give_gradients(k, model)
        for p, w in pairs:
            w.data, w.grad = p.detach().float(), p.grad.float()
            state = {key: value.float().clone() for key, value in optimizer.state[p].items()}
            reference.state[w] = state
        optimizer.step()
        reference.step()
        for p, w in pairs:
            assert_one_unit_apart(p.detach(), w.detach())
            for key, found in optimizer.state[p].items():
                assert_one_unit_apart(found, reference.state[w][key])
    assert optimizer.fallbacks == [""]


def assert_one_unit_apart(found: Tensor, expected: Tensor) -> None:
    if found.dtype is torch.float32:  # the number of steps
        assert torch.equal(found, expected)
        return
    units = torch.stack([found, expected.to(found.dtype)]).view(torch.int16).int()
    assert (units[0] - units[1]).abs().max() <= 1


@pytest.mark.parametrize("case", TYPICAL)
def test_switch_turned_in_mid_training(case: str, device: Device) -> None:
    ours, reference = both(case, Net())
    for k, is_on in enumerate((True, False, True)):
        for model, optimizer in (ours, reference):
            optimizer.param_groups[0]["centralize"] = is_on
            give_gradients(2 * k, model)
            said = pytest.warns(UserWarning, match="momentum of 4 weights")
            with said if k == 2 else nullcontext():
                optimizer.step()
            step(2 * k + 1, model, optimizer)
    assert_close(ours[0], reference[0])
    assert launched(device) == 60


def test_options_turned_in_mid_training(device: Device) -> None:
    ours, reference = both("sgd", Net())
    changes = ({"weight_decay": 0.5}, {"momentum": 0.9}, {"foreach": True}, {"foreach": None})
    for k, change in enumerate(({}, *changes, {"lr": 0.02})):
        for _, optimizer in (ours, reference):
            with pytest.raises(ZeroDivisionError):  # such a step leaves nothing to the next one
                optimizer.step(lambda: 1 / 0)
            optimizer.param_groups[0].update(change)
        train([k], ours, reference)
    assert_close(ours[0], reference[0])
    assert launched(device) == 50


def test_lists_are_prepared_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock(wraps=Schedule)
    monkeypatch.setattr(_torch_cuda, "Schedule", made)
    layers = nn.ModuleList([nn.Linear(2, 3 + k // 2) for k in range(20)])  # two of each
    optimizer = SGD(layers)
    for layer in (*layers, *layers):
        optimizer.zero_grad()
        layer(torch.ones(2)).sum().backward()
        optimizer.step()
    assert made.call_count == 10
    assert device.tensors == {"Sgd": 80}


@pytest.mark.parametrize("case", TYPICAL)
def test_tensors_that_share_memory_are_left_to_torch(case: str, device: Device) -> None:
    """Kernels would not make the steps one after the other."""
    ours, reference = both(case, nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))
    train([0], ours, reference)
    for model, optimizer in (ours, reference):
        give_gradients(1, model)
        model[0].bias.grad = model[1].bias.data  # of a weight it would be copied
        optimizer.step()
    assert_equal(ours[0][1], reference[0][1])
    assert_close(ours[0], reference[0])
    assert launched(device) == 4
