"""gcx.torch.AdamW and SGD with kernels make the steps of torch's fused optimizers.

Options are powers of two and their like, which float32 holds as they are. On a CPU, torch's fused
step takes ``1 - lr * weight_decay`` and the corrections of bias from float64; on CUDA it takes them
from float32, as the kernels do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

import gcx.torch
from gcx.backends import _torch_cuda
from gcx.backends.cuda.launcher import Schedule
from gcx.testing import assert_centralized
from gcx.torch import _fused_step
from gcx.torch._fused import SGD, AdamW

from copies import COPIES
from torch_kernels import (
    EMULATED,
    Device,
    assert_equal,
    distance,
    everywhere,
    give_gradients,
    on_cuda,
    on_gpu,
)

pytestmark = pytest.mark.one_framework

STEPS = 6
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
TYPICAL = ("adamw", "momentum")

Pair = tuple[Any, Any]  # a model and its optimizer


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device on which the optimizers find kernels; on a CPU, the hooks do not."""
    device = Device(getattr(request, "param", EMULATED), monkeypatch)
    if device.type == "cpu":
        monkeypatch.setattr(_fused_step, "is_for_kernels", lambda _: True)
    return device


class Net(nn.Module):
    """Fan-ins that are rows and columns, beside biases and norms.

    A fan-in of the transposed convolution `down` is one column, or `runs` of neighbours.
    """

    def __init__(self, head: torch.dtype = torch.float32, *, runs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 1, groups=2)
        self.down = nn.ConvTranspose1d(5, 7, runs)
        self.head = nn.Linear(70, 3, dtype=head)


class LargeNet(nn.Module):
    """Fan-ins of many lengths, which take long without a GPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 64, 7)  # 147: not a multiple of four
        self.norm = nn.BatchNorm2d(64)
        self.conv = nn.Conv2d(64, 33, 3)
        self.up = nn.ConvTranspose2d(32, 48, 1, groups=2)
        self.columns = nn.ConvTranspose1d(768, 96, 1)
        self.linear = nn.Linear(4096, 24)
        self.long = nn.Linear(14336, 10)
        self.longer = nn.Linear(40000, 3)


def new_net(device: Device, **options: Any) -> Any:
    return (LargeNet() if device.type == "cuda" else Net()).to(device.type, **options)


def hooked(model: nn.Module, kind: Any, groups: Any = None, **options: Any) -> Optimizer:
    optimizer = BASES[kind](groups or model.parameters(), **options)
    gcx.torch.centralize(optimizer, model)
    return optimizer


def both(case: str, model: nn.Module, groups: Any = None, **options: Any) -> tuple[Pair, Pair]:
    """Make ours, and torch's with further options and the hooks."""
    kind, of_case = CASES[case]
    groups = groups or (lambda model: model.parameters())
    twin = copy.deepcopy(model)
    reference = hooked(twin, kind, groups(twin), **of_case, **options)
    return (model, kind(groups(model), model=model, **of_case)), (twin, reference)


def step(k: int, model: nn.Module, optimizer: Optimizer) -> None:
    give_gradients(k, model)
    optimizer.step()


def step_by_closure(k: int, model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.step(lambda: give_gradients(k, model))


def step_without_some(k: int, model: Any, optimizer: Optimizer) -> None:
    """Not all parameters have made the same number of steps."""
    give_gradients(k, model)
    if k % 3 != 1:
        model.up.weight.grad = model.head.bias.grad = None
    optimizer.step()


def train(
    steps: Iterable[int], *pairs: Pair, training: Callable[[int, Any, Any], None] = step
) -> None:
    for k in steps:
        for pair in pairs:
            training(k, *pair)


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    """Some roundings of float32 apart, and of bfloat16 where that is the dtype."""
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        epsilon = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=32 * epsilon, atol=8 * epsilon)


def assert_close_states(found: Optimizer, expected: Optimizer) -> None:
    one, other = found.state_dict(), expected.state_dict()
    for group in (*one["param_groups"], *other["param_groups"]):
        group["fused"] = group["foreach"] = None  # ours is both in its own way
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=1e-4, atol=1e-6)


# Torch's steps


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
    assert sum(device.tensors.values()) == steps * len([*ours[0].parameters()])
    assert "step of group 0: in one launch" in repr(ours[1])


def small_net() -> nn.Module:
    return nn.ConvTranspose1d(5, 7, 1)


def long_net(length: int = 5000) -> nn.Module:
    """Rows of this length, and columns that no tile holds."""
    return nn.ModuleList([nn.Linear(length, 2), nn.ConvTranspose1d(300, 40, 1)])


def longer_net() -> nn.Module:
    """No thread block holds a row."""
    return long_net(9000)


@pytest.mark.parametrize(
    ("case", "make", "steps"),
    [
        *((case, long_net, 5) for case in CASES),
        *((case, longer_net, 5) for case in CASES if CASES[case][0] is SGD),
        *((case, lambda: Net(torch.float64), 5) for case in CASES),
        ("adamw", small_net, 100),
        ("nesterov", small_net, 100),
    ],
)
def test_steps_of_other_nets(case: str, make: Any, steps: int, device: Device) -> None:
    torch.manual_seed(0)
    assert_steps_of_torch(device, *both(case, make(), fused=True), steps)


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_are_not_there_in_each_step(case: str, device: Device) -> None:
    """In torch, the fused step of SGD fails if momentum begins at different times."""
    ours, reference = both(case, Net(), foreach=False)
    assert_steps_of_torch(device, ours, reference, 7, step_without_some)
    assert sum(device.tensors.values()) == 7 * 10 - 5 * 2
    if CASES[case][0] is AdamW:
        counts = {state["step"].item() for state in ours[1].state.values()}
        assert counts == {7.0, 2.0}


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
def test_checkpoint_goes_on_anywhere(case: str, device: Device) -> None:
    """In torch, with hooks or without; in ours; and back, in the middle of it."""
    (model, optimizer), (twin, reference) = both(case, Net(), fused=True)
    train(range(3), (model, optimizer))
    again = copy.deepcopy(model)
    others = [CASES[case][0](again), BASES[CASES[case][0]](Net().parameters())]
    for other in others:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert str(other.state_dict()) == str(optimizer.state_dict())
    load(reference, optimizer, fused=True)
    twin.load_state_dict(model.state_dict())
    pairs = (model, optimizer), (twin, reference)
    train(range(3, 6), *pairs, (again, others[0]))
    assert_equal(again, model)
    assert_close_states(others[0], optimizer)
    assert distance(model, twin) <= 2
    load(optimizer, reference, fused=None)
    model.load_state_dict(twin.state_dict())
    train(range(6, 9), *pairs)
    assert optimizer.fallbacks == [""]
    assert distance(model, twin) <= 2


def load(optimizer: Optimizer, saved: Optimizer, *, fused: bool | None) -> None:
    checkpoint = copy.deepcopy(saved.state_dict())
    for group in checkpoint["param_groups"]:
        group["fused"] = fused
    optimizer.load_state_dict(checkpoint)


@pytest.mark.parametrize("case", TYPICAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype, case: str, device: Device) -> None:
    """A step from the same state in float32, rounded, is at most one unit away."""
    kind, options = CASES[case]
    model, wide = Net().to(dtype), Net()
    optimizer: Any = kind(model, **options)
    reference = hooked(wide, kind, foreach=False, **options)
    for k in range(4):
        give_gradients(k, model)
        for p, w in zip(model.parameters(), wide.parameters(), strict=True):
            w.data, w.grad = p.detach().float(), p.grad.float()
            state = {key: value.float().clone() for key, value in optimizer.state[p].items()}
            reference.state[w] = state
        optimizer.step()
        reference.step()
        for p, w in zip(model.parameters(), wide.parameters(), strict=True):
            pairs = [(p.detach(), w.detach())]
            pairs += [(s, reference.state[w][key]) for key, s in optimizer.state[p].items()]
            for found, expected in pairs:
                assert_one_unit_apart(found, expected)
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


# Parameters for the kernels, and for torch


@pytest.mark.parametrize("case", TYPICAL)
def test_gradients_stay_what_they_are(case: str, device: Device) -> None:
    """They are read, and not written; autograd hears of all that is written."""
    kind, options = CASES[case]
    model = Net()
    optimizer = kind(model, **options)
    step(0, model, optimizer)
    give_gradients(1, model)
    grads = [(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()]
    states = [s for state in optimizer.state.values() for s in state.values() if s.ndim]
    written = [(tensor, tensor._version) for tensor in (*model.parameters(), *states)]
    optimizer.step()
    for grad, before, version in grads:
        assert torch.equal(grad, before)
        assert grad._version == version
    assert len(states) == (20 if kind is AdamW else 10)
    assert all(tensor._version > version for tensor, version in written)


@pytest.mark.parametrize("training", [step, step_by_closure])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_the_kernels_do_not_take_is_centralized_for_torch(
    case: str, alone: bool, training: Any, device: Device
) -> None:
    model = nn.ModuleDict({"down": nn.ConvTranspose1d(5, 7, 3, bias=False)})
    ours, reference = both(case, model if alone else Net(runs=3))
    train(range(STEPS), ours, reference, training=training)
    assert torch.equal(ours[0].down.weight, reference[0].down.weight)
    assert_close(ours[0], reference[0])
    assert_close_states(ours[1], reference[1])
    assert sum(device.tensors.values()) == (0 if alone else 9 * STEPS)
    (reason,) = ours[1].fallbacks
    assert "do not take a Tensor of torch.float32 and shape (5, 7, 3)" in reason


@pytest.mark.parametrize("case", CASES)
def test_model_on_a_cpu_beside_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked about the GPU, as a process that was forked must not."""
    monkeypatch.setattr(_torch_cuda, "why_not", pytest.fail)
    ours, reference = both(case, Net())
    train(range(STEPS), ours, reference)
    assert_equal(ours[0], reference[0])
    assert ours[1].fallbacks == ["no parameter on a CUDA device"]


@pytest.mark.parametrize("case", CASES)
def test_what_the_kernels_refuse_when_it_comes_to_it(case: str, device: Device) -> None:
    """As where a CUDA graph is captured before its kernels were compiled; all, or one launch."""
    ours, reference = both(case, Net(torch.bfloat16))
    single, half = "float32", "bfloat16"
    counts = [0]
    for k, device.refused in enumerate([{single, half}, set(), {single}, {half}]):
        train([k], ours, reference)
        counts.append(sum(device.tensors.values()))
    assert counts == [0, 0, 10, 12, 20]
    assert_close(ours[0], reference[0])
    states = zip(ours[1].state.values(), reference[1].state.values(), strict=True)
    assert all(one.get("step") == another.get("step") for one, another in states)


@pytest.mark.parametrize("kind", BASES)
def test_kernels_are_asked_for_on_the_device_of_the_parameters(
    kind: Any, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_torch_cuda, "why_not", lambda device: f"no kernels on {device}")
    assert kind(Net()).fallbacks == ["no kernels on cpu"]


def test_steps_are_counted_whatever_the_default_device_is(device: Device) -> None:
    """Such as the GPU, which counts on a CPU would have to be fetched from."""
    model = Net()
    optimizer = AdamW(model)
    step(0, model, optimizer)
    give_gradients(1, model)
    with torch.device("meta"):
        optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("case", TYPICAL)
def test_gradient_that_is_in_memory_in_another_way(case: str, device: Device) -> None:
    """Expanded from one element, or transposed; it may be like its parameter in a later step."""
    ours, reference = both(case, nn.Linear(3, 4))
    grads = [torch.rand(1).expand(4, 3), torch.rand(3, 4).t(), torch.rand(4, 3), torch.rand(4, 3)]
    reasons, counts = [], []
    for grad in grads:
        for model, _ in (ours, reference):
            model.weight.grad = grad.clone() if grad.stride(0) else grad
            model.bias.grad = torch.ones(4)
        reasons += ours[1].fallbacks
        ours[1].step()
        reference[1].step()
        counts.append(sum(device.tensors.values()))
    assert_close(ours[0], reference[0])
    assert counts == [1, 2, 4, 6]
    assert [bool(reason) for reason in reasons] == [True, True, False, False]


def test_sparse_gradient_of_an_embedding(device: Device) -> None:
    def train_on_tokens(k: int, model: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()

    model = nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Linear(5, 3))
    ours, reference = both("sgd", model)
    train(range(STEPS), ours, reference, training=train_on_tokens)
    assert_close(ours[0], reference[0])
    assert device.tensors == {"Sgd": 2 * STEPS}


def test_steps_that_are_counted_on_the_device_are_left_to_torch(device: Device) -> None:
    """As in a checkpoint of fused=True; to read them would be to wait for the device."""
    model = Net()
    optimizer = AdamW(model)
    step(0, model, optimizer)
    optimizer.state[model.head.weight]["step"] = torch.ones((), device="meta")
    (reason,) = optimizer.fallbacks
    assert "the steps are counted on the GPU" in reason
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # of torch's own step
        optimizer.step()
    assert device.tensors == {"AdamW": 10 + 9}


def test_numbers_of_adamw_are_those_of_float32(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's fused step on CUDA has these; float64 would lead away from it, bit by bit."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = AdamW(model, lr=0.5, weight_decay=0.25)
    found = []
    prepare = device.launcher.prepare

    def remember(*arguments: Any) -> Any:
        found.append(arguments[-1])
        return prepare(*arguments)

    monkeypatch.setattr(device.launcher, "prepare", remember)
    step(0, model, optimizer)
    optimizer.state[model.weight]["step"].fill_(1e6)
    optimizer.step()
    beta1, beta2 = 0.8999999761581421, 0.9990000128746033  # the float32 next to 0.9 and 0.999
    one = torch.tensor(1.0)
    corrected = (0.5 / (one - beta1)).item(), (one - beta2).sqrt().item()
    start = (1.0, 0.0, 1.0, 0.125, beta1, beta2)
    assert found == [(*start, *corrected, 1e-8), (*start, 0.5, 1.0, 1e-8)]


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (AdamW, {"amsgrad": True}, "amsgrad=True"),
        (AdamW, {"capturable": True}, "capturable=True"),
        (AdamW, {"differentiable": True}, "differentiable=True"),
        (AdamW, {"foreach": False}, "foreach=False"),
        (AdamW, {"fused": True}, "fused=True"),
        (AdamW, {"lr": torch.tensor(0.1)}, "lr is a tensor"),
        (AdamW, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}, "betas is a tensor"),
        (SGD, {"foreach": True}, "foreach=True"),
        (SGD, {"fused": False}, "fused=False"),
        (SGD, {"differentiable": True}, "differentiable=True"),
        (SGD, {"weight_decay": torch.tensor(0.1)}, "weight_decay is a tensor"),
    ],
)
def test_options_of_torch_alone(
    kind: Any, options: dict[str, Any], reason: str, device: Device
) -> None:
    def groups(model: Net) -> list[dict[str, Any]]:
        group = {"params": [*model.head.parameters()], **options}
        return [{"params": [*model.conv.parameters()]}, group]

    model, twin = Net(), Net()
    optimizer = kind(groups(model), model=model)
    assert optimizer.fallbacks == ["", reason]
    assert f"step of group 1: by torch ({reason})" in repr(optimizer)
    if options.keys() & {"capturable", "differentiable"}:
        return  # which are not for a CPU, or for leaves
    train(range(3), (model, optimizer), (twin, hooked(twin, kind, groups(twin))))
    assert device.tensors == {"AdamW" if kind is AdamW else "Sgd": 6}
    assert_close(model, twin)
    assert torch.equal(model.head.weight, twin.head.weight)


def test_other_hooks_find_centralized_gradients(device: Device) -> None:
    model = Net()
    optimizer = SGD(model)
    means = []
    hook = optimizer.register_step_pre_hook(
        lambda *_: means.append(model.head.weight.grad.mean(1).abs().max())
    )
    assert optimizer.fallbacks == ["other hooks before the step may use the gradients"]
    step(0, model, optimizer)
    assert means[0] < 1e-6
    hook.remove()
    step(1, model, optimizer)
    assert device.tensors == {"Sgd": 10}


def test_subclass_with_a_step_of_its_own(device: Device) -> None:
    class Printing(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Renamed(SGD):
        pass

    models = [Net(), Net(), Net()]
    optimizers = [Printing(models[0], lr=0.1), Renamed(models[1], lr=0.1)]
    optimizers.append(hooked(models[2], SGD, lr=0.1))
    train([0], *zip(models, optimizers, strict=True))
    assert_close(models[0], models[2])
    assert_close(models[1], models[2])
    assert optimizers[0].fallbacks == ["Printing has a step of its own"]
    assert device.tensors == {"Sgd": 10}


@pytest.mark.parametrize("case", TYPICAL)
def test_grad_scaler(case: str, device: Device) -> None:
    """It looks for infinities before it calls the step, unless torch's fused one is asked for."""
    ours, reference = both(case, Net())
    for model, optimizer in (ours, reference):
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        for k, factor in enumerate((1, torch.inf, 1, 1)):
            give_gradients(k, model)
            model.conv.weight.grad *= factor
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert_close(ours[0], reference[0])
    assert sum(device.tensors.values()) == 30
    ours[1].grad_scale = torch.ones(())
    assert ours[1].fallbacks == ["grad_scale is set"]


def test_fallbacks_of_a_model_with_replaced_parameters(device: Device) -> None:
    """They can be asked for, though a step is an error."""
    model = Net()
    optimizer = SGD(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    (reason,) = optimizer.fallbacks
    assert reason.startswith("conv.weight was replaced in the model")
    with pytest.raises(RuntimeError, match="was replaced in the model"):
        optimizer.step()
    assert not device.runs


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("case", TYPICAL)
def test_parts_of_dtensors_with_whole_fan_ins(case: str, device: Device, mesh: Any) -> None:
    """FSDP has such parts. The fan-in of one weight is cut, and torch makes its step."""
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(8, 4), nn.Linear(8, 4, bias=False))
    twin = copy.deepcopy(model)

    for layer, axis in zip(model, (0, 0, 1), strict=True):
        for name, p in [*layer.named_parameters()]:
            part = distribute_tensor(p.detach(), mesh, [Shard(axis)])
            layer.register_parameter(name, nn.Parameter(part))
    kind, options = CASES[case]
    optimizer, reference = kind(model, **options), hooked(twin, kind, **options)
    for k in range(3):
        give_gradients(k, twin)
        for p, of_twin in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = distribute_tensor(of_twin.grad, mesh, p.placements)
        versions = [p._version for p in model.parameters()]
        optimizer.step()
        reference.step()
        assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    for p, of_twin in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), of_twin, rtol=4e-6, atol=1e-6)
    assert sum(device.tensors.values()) == 3 * 4
    (reason,) = optimizer.fallbacks
    assert "do not take a DTensor of torch.float32 and shape (4, 8)" in reason


# Changes between steps


@pytest.mark.parametrize("case", TYPICAL)
def test_switch_turned_in_mid_training(case: str, device: Device) -> None:
    ours, reference = both(case, Net())
    for k, is_on in enumerate((True, False, True)):
        for model, optimizer in (ours, reference):
            optimizer.param_groups[0]["centralize"] = is_on
            give_gradients(2 * k, model)
            if k == 2:
                with pytest.warns(UserWarning, match="momentum of 4 weights"):
                    optimizer.step()
            else:
                optimizer.step()
            step(2 * k + 1, model, optimizer)
    assert_close(ours[0], reference[0])
    assert sum(device.tensors.values()) == 60


def test_options_turned_in_mid_training(device: Device) -> None:
    ours, reference = both("sgd", Net())
    changes = ({}, {"momentum": 0.9}, {"foreach": True}, {"foreach": None, "lr": 0.02})
    for k, change in enumerate(changes):
        for _, optimizer in (ours, reference):
            optimizer.param_groups[0].update(change)
        train([k], ours, reference)
    assert_close(ours[0], reference[0])
    assert sum(device.tensors.values()) == 30


def test_errors_come_before_anything_is_changed(device: Device) -> None:
    model = Net()
    groups = [{"params": layer.parameters()} for layer in (model.conv, model.head)]
    optimizer = SGD(groups, model=model)
    before = copy.deepcopy(model)
    give_gradients(0, model)
    model.head.weight.grad = model.head.weight.grad.to_sparse()
    with pytest.raises(TypeError, match=r"head\.weight has a gradient of layout torch\.sparse"):
        optimizer.step()
    assert_equal(model, before)
    assert not device.runs


def test_lists_are_prepared_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def prepare(*arguments: Any) -> Schedule:
        made.append(arguments)
        return Schedule(*arguments)

    monkeypatch.setattr(_torch_cuda, "Schedule", prepare)
    layers = nn.ModuleList([nn.Linear(2, 3 + k // 2) for k in range(20)])  # two of each
    optimizer = SGD(layers)
    for layer in (*layers, *layers):
        optimizer.zero_grad()
        layer(torch.ones(2)).sum().backward()
        optimizer.step()
    assert len(made) == 10
    assert device.tensors == {"Sgd": 80}


@pytest.mark.parametrize("copied", COPIES)
def test_copies_step_by_kernels(copied: str, device: Device) -> None:
    model = Net()
    optimizer = SGD(model, momentum=0.9)
    step(0, model, optimizer)
    twin = COPIES[copied]((model, optimizer))
    train([1], (model, optimizer), twin)
    assert device.tensors == {"SgdMomentum": 30}
    assert_equal(twin[0], model)


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
    assert sum(device.tensors.values()) == 4


# A GPU alone


@on_cuda
@pytest.mark.parametrize("kind", BASES)
def test_one_launch_for_each_kind_of_kernel(kind: Any, device: Device) -> None:
    """Rows, long rows, columns, tensors without a fan-in, and two launches for split columns."""
    model = new_net(device)
    optimizer = kind(model)
    step(0, model, optimizer)
    assert on_gpu(optimizer.step) == {"gcx_kernel": 6}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Let every call that waits for the device raise an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@on_cuda
@pytest.mark.parametrize("kind", BASES)
def test_steps_do_not_wait(kind: Any, device: Device, request: pytest.FixtureRequest) -> None:
    model = new_net(device)
    optimizer = kind(model)
    step(0, model, optimizer)
    request.getfixturevalue("no_waiting")
    for _ in range(3):
        for p in model.parameters():
            p.grad = p.grad.clone()  # at another address
        optimizer.step()


@on_cuda
def test_addresses_that_change(device: Device) -> None:
    ours, reference = both("sgd", new_net(device), fused=True)
    kept = []
    for k in range(50):
        give_gradients(k, ours[0], reference[0])
        kept.append(torch.empty(1 + 1000 * (k % 7), device="cuda"))  # so that others are taken
        ours[1].step()
        reference[1].step()
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
