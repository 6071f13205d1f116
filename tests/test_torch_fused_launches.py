"""Which parameters the fused optimizers give to the kernels, and when; the rest goes torch's way.

The kernels are replaced by operations of torch here, so that this runs anywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.optim import Optimizer

import gcx.torch
from gcx.backends import _torch_cuda
from gcx.torch._fused import SGD, AdamW
from gcx.torch._optimizer import AdamWRule

from torch_kernels import MultiTensor, Runs, replace_kernels

pytestmark = pytest.mark.one_framework

STEPS = 6
BASES: dict[Any, Any] = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """What the kernels have run: the rule and the number of parameters of each launch."""
    return replace_kernels(monkeypatch)


class Net(nn.Module):
    """A weight of each kind of layout, biases and norms, in dtypes of one's choice."""

    def __init__(self, head: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.head = nn.Linear(150, 3, dtype=head)
        self.steps = 0


def backward(model: Net) -> None:
    """Give each parameter the gradient that it has in this step, whatever the weights are."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(model.steps)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).add_(0.5).to(p.dtype)
    model.steps += 1


def step(model: Net, optimizer: Optimizer) -> None:
    backward(model)
    optimizer.step()


def step_by_closure(model: Net, optimizer: Optimizer) -> None:
    optimizer.step(lambda: backward(model))


def step_without_some(model: Net, optimizer: Optimizer) -> None:
    """Not all parameters have made the same number of steps."""
    backward(model)
    if model.steps % 2:
        model.up.weight.grad = model.head.bias.grad = None
    optimizer.step()


def hooked(model: nn.Module, kind: Any, groups: Any = None, **options: Any) -> Optimizer:
    optimizer = BASES[kind](groups or model.parameters(), **options)
    gcx.torch.centralize(optimizer, model)
    return optimizer


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    """Some roundings of float32 apart, and of bfloat16 where that is the dtype."""
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        epsilon = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=32 * epsilon, atol=8 * epsilon)


def assert_same_bits(found: nn.Module, expected: nn.Module) -> None:
    pairs = zip(found.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def assert_close_states(found: Optimizer, expected: Optimizer) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=1e-4, atol=1e-6)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "adamw-maximize": (AdamW, {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-4}),
    "sgd": (SGD, {}),
    "sgd-decay": (SGD, {"weight_decay": 0.1, "maximize": True}),
    "sgd-momentum": (SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd-nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("training", [step, step_by_closure, step_without_some])
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_torch_with_hooks(
    case: str, training: Callable[..., None], runs: Runs
) -> None:
    kind, options = CASES[case]
    model, twin = Net(), Net()
    optimizer, other = kind(model, lr=0.01, **options), hooked(twin, kind, lr=0.01, **options)
    for _ in range(STEPS):
        training(model, optimizer)
        training(twin, other)
    assert_close(model, twin)
    assert_close_states(optimizer, other)
    fewer = STEPS // 2 * 2 if training is step_without_some else 0
    assert sum(count for _, count in runs) == STEPS * 8 - fewer
    assert optimizer.fallbacks == [""]
    assert "step of group 0: in one launch" in repr(optimizer)


@pytest.mark.parametrize("kind", BASES)
def test_gradients_stay_what_they_are(kind: Any, runs: Runs) -> None:
    """They are read, and not written: the step is all the better for it."""
    model = Net()
    optimizer = kind(model)
    backward(model)
    before = [p.grad.clone() for p in model.parameters()]
    versions = [p.grad._version for p in model.parameters()]
    optimizer.step()
    assert all(
        torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True)
    )
    assert [p.grad._version for p in model.parameters()] == versions


@pytest.mark.parametrize("kind", BASES)
def test_one_launch_for_each_group_and_dtype(kind: Any, runs: Runs) -> None:
    def groups(model: Net) -> list[dict[str, Any]]:
        vectors = [p for p in model.parameters() if p.ndim == 1]
        return [
            {"params": [model.conv.weight, model.up.weight]},
            {"params": vectors, "weight_decay": 0.0},
            {"params": [model.head.weight], "centralize": False, "lr": 0.02},
        ]

    model, twin = Net(torch.bfloat16), Net(torch.bfloat16)
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = kind(groups(model), model=model, **options)
    other = hooked(twin, kind, groups(twin), **options)
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    assert runs[:4] == runs[4:8] == runs[8:]
    name = kind.__name__.lower()
    assert runs[:4] == [(name, 2), (name, 4), (name, 1), (name, 1)]
    assert_close(model, twin)


@pytest.mark.parametrize("training", [step, step_by_closure])
@pytest.mark.parametrize("kind", BASES)
def test_what_the_kernels_do_not_take_is_centralized_for_torch(
    kind: Any, training: Callable[..., None], runs: Runs
) -> None:
    model, twin = Net(torch.float64), Net(torch.float64)
    optimizer = kind(model, lr=0.01, weight_decay=0.1)
    other = hooked(twin, kind, lr=0.01, weight_decay=0.1)
    for _ in range(STEPS):
        training(model, optimizer)
        training(twin, other)
    assert torch.equal(model.head.weight, twin.head.weight)
    assert torch.equal(model.head.bias, twin.head.bias)
    assert_close(model, twin)
    assert runs == [(kind.__name__.lower(), 6)] * STEPS
    assert optimizer.fallbacks == ["a parameter is torch.float64"]


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_the_kernels_take(case: str, runs: Runs) -> None:
    kind, options = CASES[case]
    model, twin = Net().double(), Net().double()
    optimizer, other = kind(model, **options), hooked(twin, kind, **options)
    for _ in range(STEPS):
        step(model, optimizer)
        step(twin, other)
    assert_same_bits(model, twin)
    assert_close_states(optimizer, other)
    assert not runs


@pytest.mark.parametrize("case", CASES)
def test_what_the_kernels_refuse_when_it_comes_to_it(case: str, runs: Runs) -> None:
    """As where a CUDA graph is captured before its kernels were compiled; all, or one launch."""
    kind, options = CASES[case]
    model, twin = Net(torch.bfloat16), Net(torch.bfloat16)
    optimizer, other = kind(model, lr=0.01, **options), hooked(twin, kind, lr=0.01, **options)
    for refused in ({torch.float32, torch.bfloat16}, set(), {torch.float32}, {torch.bfloat16}):
        MultiTensor.refused = refused
        step(model, optimizer)
        step(twin, other)
    assert_close(model, twin)
    states = zip(optimizer.state.values(), other.state.values(), strict=True)
    assert all(one.get("step") == another.get("step") for one, another in states)
    assert [count for _, count in runs] == [6, 2, 2, 6]


@pytest.mark.parametrize("case", CASES)
def test_model_on_a_cpu_beside_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked about the GPU, as a process that was forked must not."""
    kind, options = CASES[case]
    monkeypatch.setattr(_torch_cuda, "why_not", pytest.fail)
    model, twin = Net(), Net()
    optimizer, other = kind(model, **options), hooked(twin, kind, **options)
    for _ in range(STEPS):
        step(model, optimizer)
        step(twin, other)
    assert_same_bits(model, twin)
    assert optimizer.fallbacks == ["no parameter on a CUDA device"]


@pytest.mark.parametrize("kind", BASES)
def test_kernels_are_asked_for_on_the_device_of_the_parameters(
    kind: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_torch_cuda, "why_not", lambda device: f"no kernels on {device}")
    assert kind(Net()).fallbacks == ["no kernels on cpu"]


def test_steps_are_counted_whatever_the_default_device_is(runs: Runs) -> None:
    """Such as the GPU, which counts on a CPU would have to be fetched from."""
    model = Net()
    optimizer = AdamW(model)
    step(model, optimizer)
    backward(model)
    with torch.device("meta"):
        optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("kind", BASES)
def test_gradient_that_is_in_memory_in_another_way(kind: Any, runs: Runs) -> None:
    """Expanded from one element, or transposed; it may be like its parameter in a later step."""
    model, twin = nn.Linear(3, 4), nn.Linear(3, 4)
    twin.load_state_dict(model.state_dict())
    optimizer, other = kind(model), hooked(twin, kind)
    grads = [torch.rand(1).expand(4, 3), torch.rand(3, 4).t(), torch.rand(4, 3), torch.rand(4, 3)]
    reasons = []
    for grad in grads:
        for each, its in ((model, optimizer), (twin, other)):
            each.weight.grad, each.bias.grad = grad.clone(), torch.ones(4)
            if grad.stride(0) == 0:
                each.weight.grad = grad
            if its is optimizer:
                reasons.append(optimizer.fallbacks[0])
            its.step()
    assert_close(model, twin)
    assert [count for _, count in runs] == [1, 1, 2, 2]
    assert [bool(reason) for reason in reasons] == [True, True, False, False]


def test_sparse_gradient_of_an_embedding(runs: Runs) -> None:
    pairs = []
    for make in (SGD, lambda model, lr: hooked(model, SGD, lr=lr)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Linear(5, 3))
        optimizer = make(model, lr=0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.tensor([1, 2])).square().sum().backward()
            optimizer.step()
        pairs.append(model)
    assert_close(*pairs)
    assert runs == [("sgd", 2)] * STEPS


# Checkpoints


@pytest.mark.parametrize("case", ["adamw", "sgd-momentum"])
def test_checkpoint_of_kernels_resumes_anywhere(case: str, runs: Runs) -> None:
    kind, options = CASES[case]
    model = Net()
    optimizer = kind(model, lr=0.01, **options)
    for _ in range(3):
        step(model, optimizer)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    models = [copy.deepcopy(model) for _ in range(2)]
    others = [kind(models[0]), hooked(models[1], kind)]
    for other in others:
        other.load_state_dict(copy.deepcopy(checkpoint))
        assert str(other.state_dict()) == str(checkpoint)
    for _ in range(3):
        step(model, optimizer)
        for each, its in zip(models, others, strict=True):
            step(each, its)
    assert_close(models[0], model)
    assert_close(models[1], model)
    assert_close_states(others[0], optimizer)
    # And back, in the middle of it.
    optimizer.load_state_dict(copy.deepcopy(others[1].state_dict()))
    step(model, optimizer)
    step(models[1], others[1])
    assert_close(models[1], model)


def test_steps_that_are_counted_on_the_device_are_left_to_torch(runs: Runs) -> None:
    """As in a checkpoint of fused=True; to read them would be to wait for the device."""
    model = Net()
    optimizer = AdamW(model)
    step(model, optimizer)
    runs.clear()
    optimizer.state[model.head.weight]["step"] = torch.ones((), device="meta")
    (reason,) = optimizer.fallbacks
    assert "the steps are counted on the GPU" in reason
    rule = AdamWRule()
    states = [optimizer.state[p] for p in (model.head.weight, model.head.bias)]
    assert rule.stages(optimizer.param_groups[0], states) == [None, 1.0]


def test_numbers_of_adamw_are_those_of_float32() -> None:
    """As on CUDA in the fused step of torch, which float64 would lead away from, bit by bit."""
    group = AdamW(Net(), lr=0.5, weight_decay=0.25).param_groups[0]
    found = AdamWRule().scalars(group, 0.0)
    beta1, beta2 = 0.8999999761581421, 0.9990000128746033  # the float32 next to 0.9 and 0.999
    assert (found["beta1"], found["beta2"]) == (beta1, beta2)
    assert found["decay"] == 0.125
    one = torch.tensor(1.0)
    assert found["step_size"] == (0.5 / (one - beta1)).item()
    assert found["bias2_root"] == (one - beta2).sqrt().item()
    assert AdamWRule().scalars(group, 1e6) == {**found, "step_size": 0.5, "bias2_root": 1.0}


# Fallbacks


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
    kind: Any, options: dict[str, Any], reason: str, runs: Runs
) -> None:
    model = Net()
    group = {"params": model.head.parameters(), **options}
    optimizer = kind([{"params": model.conv.parameters()}, group], model=model)
    assert optimizer.fallbacks == ["", reason]
    assert f"step of group 1: by torch ({reason})" in repr(optimizer)
    if options.keys() & {"capturable", "differentiable"}:
        return  # which are not for a CPU, or for leaves
    twin = Net()
    other = hooked(
        twin,
        kind,
        [{"params": [*twin.conv.parameters()]}, {**group, "params": [*twin.head.parameters()]}],
    )
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    assert runs == [(kind.__name__.lower(), 2)] * 3
    assert_close(model, twin)
    assert torch.equal(model.head.weight, twin.head.weight)


def test_other_hooks_find_centralized_gradients(runs: Runs) -> None:
    model = Net()
    optimizer = SGD(model)
    means = []
    hook = optimizer.register_step_pre_hook(
        lambda *_: means.append(model.head.weight.grad.mean(1).abs().max())
    )
    assert optimizer.fallbacks == ["other hooks before the step may use the gradients"]
    step(model, optimizer)
    assert means[0] < 1e-6
    hook.remove()
    step(model, optimizer)
    assert runs == [("sgd", 8)]


def test_subclass_with_a_step_of_its_own(runs: Runs) -> None:
    class Printing(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Renamed(SGD):
        pass

    models = [Net(), Net(), Net()]
    optimizers = [Printing(models[0], lr=0.1), Renamed(models[1], lr=0.1)]
    optimizers.append(hooked(models[2], SGD, lr=0.1))
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    assert_close(models[0], models[2])
    assert_close(models[1], models[2])
    assert optimizers[0].fallbacks == ["Printing has a step of its own"]
    assert runs == [("sgd", 8)]


@pytest.mark.parametrize("kind", BASES)
def test_grad_scaler(kind: Any, runs: Runs) -> None:
    """It looks for infinities before it calls the step, unless torch's fused one is asked for."""
    model, twin = Net(), Net()
    optimizer, other = kind(model, lr=0.01), hooked(twin, kind, lr=0.01)
    for each, its in ((model, optimizer), (twin, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        for factor in (1, torch.inf, 1, 1):
            backward(each)
            each.conv.weight.grad *= factor
            scaler.unscale_(its)
            scaler.step(its)
            scaler.update()
    assert_close(model, twin)
    assert len(runs) == 3
    optimizer.grad_scale = torch.ones(())
    assert optimizer.fallbacks == ["grad_scale is set"]


def test_fallbacks_of_a_model_with_replaced_parameters(runs: Runs) -> None:
    """They can be asked for, though a step is an error."""
    model = Net()
    optimizer = SGD(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    (reason,) = optimizer.fallbacks
    assert reason.startswith("conv.weight was replaced in the model")
    with pytest.raises(RuntimeError, match="was replaced in the model"):
        optimizer.step()
    assert not runs


# What changes between steps


@pytest.mark.parametrize("kind", BASES)
def test_switch_turned_in_mid_training(kind: Any, runs: Runs) -> None:
    model, twin = Net(), Net()
    options = {"lr": 0.01, **({"momentum": 0.9} if kind is SGD else {})}
    optimizer, other = kind(model, **options), hooked(twin, kind, **options)
    for is_on in (True, False, True):
        for each, its in ((model, optimizer), (twin, other)):
            its.param_groups[0]["centralize"] = is_on
            backward(each)
            if is_on and len(runs) > 2:
                with pytest.warns(UserWarning, match="momentum of 3 weights"):
                    its.step()
            else:
                its.step()
            step(each, its)
    assert_close(model, twin)
    assert len(runs) == 6


def test_options_turned_in_mid_training(runs: Runs) -> None:
    model, twin = Net(), Net()
    optimizer, other = SGD(model, lr=0.01), hooked(twin, SGD, lr=0.01)
    for change in ({}, {"momentum": 0.9}, {"foreach": True}, {"foreach": None, "lr": 0.02}):
        for each, its in ((model, optimizer), (twin, other)):
            its.param_groups[0].update(change)
            step(each, its)
    assert_close(model, twin)
    assert len(runs) == 3


def test_errors_come_before_anything_is_changed(runs: Runs) -> None:
    model = Net()
    groups = [{"params": layer.parameters()} for layer in (model.conv, model.head)]
    optimizer = SGD(groups, model=model)
    before = copy.deepcopy(model.state_dict())
    backward(model)
    model.head.weight.grad = model.head.weight.grad.to_sparse()
    with pytest.raises(TypeError, match=r"head\.weight has a gradient of layout torch\.sparse"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not runs


def test_tables_of_so_many_lists_are_kept(runs: Runs) -> None:
    layers = nn.ModuleList([nn.Linear(2, 3) for _ in range(20)])
    optimizer = SGD(layers)
    for layer in layers:
        optimizer.zero_grad()
        layer(torch.ones(2)).sum().backward()
        optimizer.step()
    assert runs == [("sgd", 2)] * 20
    assert len(optimizer._centralization.hooks._kept) == 8


def test_copies_make_their_own_tables(runs: Runs) -> None:
    model = Net()
    optimizer = SGD(model, momentum=0.9)
    step(model, optimizer)
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert not twin._centralization.hooks._kept
    step(model, optimizer)
    step(twin_model, twin)
    assert len(runs) == 3
    assert_close(twin_model, model)
