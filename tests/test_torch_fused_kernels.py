"""gcx.torch.AdamW and SGD with kernels make the steps of torch's fused optimizers, or leave them.

Options are powers of two and their like, which float32 holds as they are. On a CPU, torch's fused
step takes ``1 - lr * weight_decay`` and the corrections of bias from float64; on CUDA it takes them
from float32, as the kernels do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor

from gcx.backends import _torch_cuda
from gcx.torch._fused import SGD, AdamW

from torch_kernels import (
    BASES,
    CASES,
    STEPS,
    TYPICAL,
    Device,
    Net,
    assert_close,
    assert_close_states,
    assert_equal,
    assert_steps_of_torch,
    both,
    everywhere,
    give_gradients,
    hooked,
    new_net,
    step,
    step_by_closure,
    train,
)
from torch_kernels import make_device_for_steps as make_device  # noqa: F401 - for `device`


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
    assert device.total == steps * len([*ours[0].parameters()])
    assert "step of group 0: in one launch" in repr(ours[1])


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
    vectors = [(rule.removesuffix("Rate"), count) for count in (5, 1)]  # in float32 and float64
    assert device.runs == [(rule, 1), *vectors, (rule, 2), (rule, 1)] * 5


CHANGES: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"weight_decay": 0.5}, {"momentum": 0.9}, {"foreach": True}, {"foreach": None}],
    "adamw": [{"weight_decay": 0.5}, {"betas": (0.8, 0.9)}, {"fused": True}, {"fused": None}],
}


@pytest.mark.parametrize("case", CHANGES)
def test_options_turned_in_mid_training(case: str, device: Device) -> None:
    """As schedulers turn them."""
    ours, reference = both(case, Net())
    for k, change in enumerate(({}, *CHANGES[case], {"lr": 0.02, "centralize": False})):
        for _, optimizer in (ours, reference):
            with pytest.raises(ZeroDivisionError):  # such a step leaves nothing to the next one
                optimizer.step(lambda: 1 / 0)
            optimizer.param_groups[0].update(change)
        train([k], ours, reference)
    for model, optimizer in (ours, reference):
        optimizer.param_groups[0]["centralize"] = True
        with pytest.warns(UserWarning, match="momentum of 4 weights"):
            step(6, model, optimizer)
    assert_close(ours[0], reference[0])
    assert device.total == 60


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
    assert device.total == 4


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
    assert device.total == (0 if alone else 9 * STEPS)
    (reason,) = ours[1].fallbacks
    assert "do not take a Tensor of torch.float32 and shape (5, 7, 3)" in reason


@pytest.mark.parametrize("kind", BASES)
def test_kernels_are_asked_for_on_a_gpu_alone(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was forked must not ask about the GPU."""
    monkeypatch.setattr(_torch_cuda, "why_not", pytest.fail)
    model = Net()
    train(range(2), (model, optimizer := kind(model)))
    assert optimizer.fallbacks == ["no parameter on a CUDA device"]
    monkeypatch.setattr(_torch_cuda, "why_not", "no kernels on {}".format)
    monkeypatch.setattr("gcx.torch._fused.is_for_kernels", lambda _: True)
    assert optimizer.fallbacks == ["no kernels on cpu"]


@pytest.mark.parametrize("case", CASES)
def test_what_the_kernels_refuse_when_it_comes_to_it(case: str, device: Device) -> None:
    """As where a CUDA graph is captured before its kernels were compiled; all, or one launch."""
    ours, reference = both(case, Net(torch.bfloat16))
    single, half = "float32", "bfloat16"
    counts = [0]
    for k, device.refused in enumerate([{single, half}, set(), {single}, {half}]):
        train([k], ours, reference)
        counts.append(device.total)
    assert counts == [0, 0, 10, 12, 20]
    assert_close(ours[0], reference[0])
    states = zip(ours[1].state.values(), reference[1].state.values(), strict=True)
    assert all(one.get("step") == another.get("step") for one, another in states)


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
    pairs = both(case, nn.Linear(3, 4))
    (model, optimizer), (twin, _) = pairs
    grads = [torch.rand(1).expand(4, 3), torch.rand(3, 4).t(), torch.rand(4, 3), torch.rand(4, 3)]
    for grad, is_left, count in zip(grads, (1, 1, 0, 0), (1, 2, 4, 6), strict=True):
        for each in (model, twin):
            each.weight.grad = grad.clone() if grad.stride(0) else grad
            each.bias.grad = torch.ones(4)
        assert [bool(reason) for reason in optimizer.fallbacks] == [is_left]
        for _, each in pairs:
            each.step()
        assert device.total == count
    assert_close(model, twin)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_adamw(
    dtype: torch.dtype, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to float32, as in torch's fused step on CUDA, unless the moments are float64."""
    model = nn.Linear(3, 2, bias=False, dtype=dtype)
    optimizer = AdamW(model, lr=0.5, weight_decay=0.25)
    prepare = Mock(wraps=device.launcher.prepare)
    monkeypatch.setattr(device.launcher, "prepare", prepare)
    step(0, model, optimizer)
    optimizer.state[model.weight]["step"].fill_(1e6)
    optimizer.step()
    one, beta1, beta2 = torch.tensor([1.0, 0.9, 0.999], dtype=dtype)
    corrected = (0.5 / (one - beta1)).item(), (one - beta2).sqrt().item()
    start = (1.0, 0.0, 1.0, 0.125, beta1.item(), beta2.item())
    found = [call.args[-1] for call in prepare.call_args_list]
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
    model, twin = Net(), Net()
    groups, of_twin = (
        [{"params": [*net.conv.parameters()]}, {"params": [*net.head.parameters()], **options}]
        for net in (model, twin)
    )
    optimizer = kind(groups, model=model)
    assert optimizer.fallbacks == ["", reason]
    assert f"step of group 1: by torch ({reason})" in repr(optimizer)
    if options.keys() & {"capturable", "differentiable"}:
        return  # which are not for a CPU, or for leaves
    train(range(3), (model, optimizer), (twin, hooked(twin, kind, of_twin)))
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
    optimizer.grad_scale = torch.ones(())
    assert optimizer.fallbacks == ["grad_scale is set"]


def test_subclass_with_a_step_of_its_own(device: Device) -> None:
    class Printing(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    models = [Net(), Net(), Net()]
    kinds = Printing, type("Renamed", (SGD,), {})
    optimizers = [kind(model, lr=0.1) for kind, model in zip(kinds, models[:2], strict=True)]
    train([0], *zip(models, [*optimizers, hooked(models[2], SGD, lr=0.1)], strict=True))
    for model in models[:2]:
        assert_close(model, models[2])
    assert [each.fallbacks for each in optimizers] == [["Printing has a step of its own"], [""]]
    assert device.tensors == {"Sgd": 10}


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
    pairs = [*zip(model.parameters(), twin.parameters(), strict=True)]
    for k in range(3):
        give_gradients(k, twin)
        for p, of_twin in pairs:
            p.grad = distribute_tensor(of_twin.grad, mesh, p.placements)
        versions = [p._version for p, _ in pairs]
        optimizer.step()
        reference.step()
        assert all(p._version > v for (p, _), v in zip(pairs, versions, strict=True))
    for p, of_twin in pairs:
        torch.testing.assert_close(p.full_tensor(), of_twin, rtol=4e-6, atol=1e-6)
    assert device.total == 3 * 4
    (reason,) = optimizer.fallbacks
    assert "do not take a DTensor of torch.float32 and shape (4, 8)" in reason
