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
from gcx.testing import assert_centralized
from gcx.torch._fused import SGD, AdamW

from torch_fused_steps import (
    BASES,
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
    no_waiting,
    on_cuda,
    on_gpu,
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


@on_cuda
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(kind: Any, dtype: torch.dtype, device: Device) -> None:
    """A step from the same weights, with gradients that were rounded before, is a unit away."""
    model = new_net(device, dtype=dtype)
    twin = copy.deepcopy(model)
    options = {"lr": 2**-6, "weight_decay": 2**-4}
    optimizer, reference = kind(model, **options), hooked(twin, kind, fused=True, **options)
    train([0], (model, optimizer), (twin, reference))
    assert optimizer.fallbacks == [""]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        top = other.detach().abs().max()
        assert (one - other).abs().max() <= 2 * torch.finfo(dtype).eps * top


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
    changes = ({}, {"momentum": 0.9}, {"foreach": True}, {"foreach": None, "lr": 0.02})
    for k, change in enumerate(changes):
        for _, optimizer in (ours, reference):
            optimizer.param_groups[0].update(change)
        train([k], ours, reference)
    assert_close(ours[0], reference[0])
    assert launched(device) == 30


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


# A GPU alone


@on_cuda
@pytest.mark.parametrize("kind", BASES)
def test_steps_do_not_wait(kind: Any, device: Device) -> None:
    """There is a launch for each kind of kernel.

    These are for rows, long rows, columns, tensors without a fan-in, and two for split columns.
    """
    model = new_net(device)
    optimizer = kind(model)
    step(0, model, optimizer)
    with no_waiting():
        for _ in range(3):
            for p in model.parameters():
                p.grad = p.grad.clone()  # at another address
            optimizer.step()
    assert on_gpu(optimizer.step) == {"gcx_kernel": 6}


@on_cuda
def test_addresses_that_change(device: Device) -> None:
    ours, reference = both("sgd", new_net(device), fused=True)
    kept = []
    for k in range(50):
        kept.append(torch.empty(1 + 1000 * (k % 7), device="cuda"))  # so that others are taken
        train([k], ours, reference)
        ours[1].zero_grad()
    assert distance(ours[0], reference[0]) <= 2


def two_of(kind: Any, device: Device, **options: Any) -> tuple[Pair, Pair]:
    """Both ours, of which the second takes its steps as usual."""
    nets = new_net(device), new_net(device)
    (one, other) = ((net, kind(net, **options)) for net in nets)
    return one, other


@on_cuda
def test_captured_step(device: Device) -> None:
    (model, optimizer), usual = two_of(SGD, device, lr=1e-3, momentum=0.9)
    train([0], (model, optimizer), usual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for k in range(1, 5):
        give_gradients(k, usual[0])
        for p, of_usual in zip(model.parameters(), usual[0].parameters(), strict=True):
            p.grad.copy_(of_usual.grad)
        graph.replay()
        usual[1].step()
    assert_equal(model, usual[0])


@on_cuda
def test_other_stream(device: Device) -> None:
    (model, optimizer), usual = two_of(AdamW, device)
    stream = torch.cuda.Stream()
    for k in range(5):
        give_gradients(k, model, usual[0])
        usual[1].step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if k % 2 else torch.cuda.current_stream()):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert_equal(model, usual[0])


@on_cuda
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_compiled_step(device: Device) -> None:
    (model, optimizer), usual = two_of(AdamW, device)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for k in range(3):
        give_gradients(k, model, usual[0])
        compiled()
        usual[1].step()
    torch.compiler.reset()
    assert optimizer.fallbacks == [""]
    assert_equal(model, usual[0])


@on_cuda
@pytest.mark.parametrize("kind", BASES)
def test_corollary_in_training(kind: Any, device: Device) -> None:
    """With autocast and a GradScaler; AdamW has no such corollary, and goes down all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).cuda()
    optimizer = kind(model, lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    x, y = torch.rand(32, 3, 8, 8, device="cuda"), torch.randint(10, (32,), device="cuda")
    start = [model[k].weight.detach().clone() for k in (0, 3)]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert optimizer.fallbacks == [""]
    assert losses[-1] < losses[0]
    if kind is SGD:
        for k, weight in zip((0, 3), start, strict=True):
            assert_centralized(model[k].weight, start=weight)


@on_cuda
@pytest.mark.parametrize("kind", BASES)
def test_checkpoint_of_the_gpu_goes_on_there_and_on_the_cpu(kind: Any, device: Device) -> None:
    model = new_net(device)
    optimizer = kind(model)
    step(0, model, optimizer)
    plain = BASES[kind](copy.deepcopy(model).parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(s["step"].is_cpu for s in plain.state.values() if "step" in s)
    on_cpu = copy.deepcopy(model).cpu()
    other = kind(on_cpu)
    other.load_state_dict(optimizer.state_dict())
    train([1], (model, optimizer), (on_cpu, other))
    for p, cpu_p in zip(model.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), cpu_p, rtol=1e-5, atol=1e-7)


@on_cuda
def test_what_is_left_to_torch(device: Device) -> None:
    """Weights on the CPU, in the same group as those that the kernel takes."""
    layers = [nn.Linear(8, 4, device="cuda"), nn.Linear(8, 4)]
    ours, reference = both("sgd", nn.ModuleList(layers))
    give_gradients(0, ours[0], reference[0])
    (reason,) = ours[1].fallbacks
    assert "on cpu" in reason
    ours[1].step()
    reference[1].step()
    for one, other in zip(ours[0].parameters(), reference[0].parameters(), strict=True):
        torch.testing.assert_close(one, other)
