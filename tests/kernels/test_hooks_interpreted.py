"""The hooks of gcx.torch with the Triton kernel, interpreted on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import gcx.torch
from gcx.backends import _tiles, _torch, _torch_cuda, _torch_triton, _triton_kernels
from gcx.testing import assert_centralized

# The interpreter cuts numbers off where the device rounds them to bfloat16, and takes the rate of
# decay in float32, which holds this one as it is.
DECAY = 0.125
DTYPES = [torch.float16, torch.float32, torch.float64]


class Launched:
    """In the place of the kernel: counts the launches, and makes them."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.count = 0

    def __getitem__(self, grid: tuple[int]) -> Any:
        self.count += 1
        return self._kernel[grid]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Let the interpreter have tensors on a CPU, from now on."""

    def takes(tensor: Tensor, axes: tuple[int, ...], _: Tensor) -> bool:
        is_known = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPES
        return is_known and _tiles.find_walk(tensor, axes, any_order=False) is not None

    monkeypatch.setattr(_torch, "is_for_kernels", lambda _: True)
    monkeypatch.setattr(_torch_cuda, "takes", takes)
    monkeypatch.setattr(_torch_cuda, "launches", _torch_cuda.Launches())
    monkeypatch.setattr(_torch_triton, "_on", lambda _: nullcontext())
    monkeypatch.setattr(_torch_triton, "_stream", lambda: 0)
    monkeypatch.setattr(_torch_triton, "_pin", lambda table: table)
    monkeypatch.setattr(_torch_triton, "_send", lambda table, *_, **__: table)
    launched = Launched(_triton_kernels.multi_tensor)
    monkeypatch.setattr(_triton_kernels, "multi_tensor", launched)
    return launched


class Net(nn.Module):
    """Fan-ins that are rows and columns in whole pieces of 16 bytes, beside biases and a norm.

    With `odd` also some in groups and some of other lengths, which makes another launch.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, *, odd: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, 2, dtype=dtype)
        self.norm = nn.BatchNorm2d(8, dtype=dtype)
        self.up = nn.ConvTranspose2d(8, 16, 1, dtype=dtype)
        self.linear = nn.Linear(64, 8, dtype=dtype)
        if odd:
            self.groups = nn.ConvTranspose2d(8, 16, 2, groups=2, dtype=dtype)
            self.odd = nn.Linear(7, 3, dtype=dtype)


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def give_gradients(model: nn.Module, seed: int) -> None:
    """New ones, with a mean, in the strides of the weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        grad = 0.5 + torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(grad)


def sgd(model: nn.Module, **options: Any) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=DECAY, **options)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3, **options: Any) -> None:
    handle = gcx.torch.centralize(optimizer, model, **options)
    for seed in range(steps):
        give_gradients(model, seed)
        optimizer.step()
    handle.remove()


def train_ordinarily(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_torch, "is_for_kernels", lambda _: False)
        train(*args, **options)


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    """Up to rounding, which is more where momentum adds up that of several steps."""
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        tolerance = 4 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("strides", [as_it_is, channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_is_that_of_the_ordinary_way(
    dtype: torch.dtype, strides: Any, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, model, twin = (strides(Net(dtype)) for _ in range(3))
    train_ordinarily(monkeypatch, twin, sgd(twin))
    assert launched.count == 0
    train(model, sgd(model))
    assert launched.count == 3
    assert_close(model, twin)
    with pytest.raises(AssertionError):
        assert_close(start, twin)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]
)
def test_gradients_are_those_of_the_ordinary_way(
    options: Any, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = Net(odd=True), Net(odd=True)
    train_ordinarily(monkeypatch, twin, SGD(twin.parameters(), lr=0.0, **options), steps=1)
    train(model, SGD(model.parameters(), lr=0.0, **options), steps=1)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert launched.count == 2  # one for what cannot be read in whole pieces


def test_one_launch_for_each_dtype_and_rate_of_decay(launched: Launched) -> None:
    model = nn.ModuleList([Net(), Net(torch.float64), Net()])
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.1},
        {"params": model[1].parameters(), "weight_decay": 0.1},
        {"params": model[2].parameters(), "weight_decay": 0.2},
    ]
    optimizer = SGD(groups, lr=0.1)
    gcx.torch.centralize(optimizer, model)
    for seed in range(3):
        give_gradients(model, seed)
        optimizer.step()
        assert launched.count == 3 * (seed + 1)


def test_groups_of_one_rate_are_launched_together(launched: Launched) -> None:
    model = Net()
    groups = [{"params": [p], "lr": 0.01 * k} for k, p in enumerate(model.parameters())]
    train(model, SGD(groups, lr=0.1, weight_decay=0.1))
    assert launched.count == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_corollary_4_1(dtype: torch.dtype, launched: Launched) -> None:
    """SGD with momentum and decay keeps the mean of each fan-in."""
    model, start = Net(dtype, odd=True), Net(dtype, odd=True)
    train(model, sgd(model, nesterov=True), steps=10)
    assert launched.count == 20
    layouts = {"conv": "o...", "up": "io...", "groups": "oio...", "linear": "oi", "odd": "oi"}
    for name, layout in layouts.items():
        weight, before = (net.get_submodule(name).weight.detach() for net in (model, start))
        if name == "groups":
            weight, before = (x.unflatten(0, (2, 4)) for x in (weight, before))
        assert_centralized(weight, start=before, layout=layout)
        assert (weight - before).abs().max() > 0.1


def centralized(weight: Tensor) -> Tensor:
    return weight - weight.mean(1, keepdim=True)


def test_what_the_kernel_does_not_take_goes_the_ordinary_way(launched: Launched) -> None:
    class Marked(Tensor):
        """A type of tensor that may do anything."""

    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(4)])
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
    rows = torch.rand(4, 4)
    grads = [rows, rows * (1 + 2j), rows[0].expand(4, 4), (rows + 1).as_subclass(Marked)]
    expected = [centralized(grad).as_subclass(Tensor) for grad in grads]
    for layer, grad in zip(model, grads, strict=True):
        layer.weight.grad = grad.clone() if grad.stride(0) else grad
    gcx.torch.centralize_grads_(model)
    assert launched.count == 1
    for layer, grad in zip(model, expected, strict=True):
        torch.testing.assert_close(layer.weight.grad.as_subclass(Tensor), grad)


def test_rate_in_a_tensor_is_not_waited_for(launched: Launched) -> None:
    """As a GradScaler sets it, while the gradients are still scaled."""

    class Still(Optimizer):
        def step(self) -> None: ...

    model = Net()
    optimizer = Still(model.parameters(), {"weight_decay": 0.5})
    gcx.torch.centralize(optimizer, model, decay="inside")
    give_gradients(model, 0)
    grad, weight = model.linear.weight.grad.clone(), model.linear.weight.detach()
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    assert launched.count == 0
    expected = grad - (grad + 4 * weight).mean(1, keepdim=True)
    torch.testing.assert_close(model.linear.weight.grad, expected)


def test_not_all_gradients_are_there_in_each_step(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(model: nn.Module) -> None:
        optimizer = sgd(model)
        gcx.torch.centralize(optimizer, model)
        for seed in range(6):
            give_gradients(model, seed)
            if seed % 2:
                model.conv.weight.grad = None
            if seed == 4:
                model.zero_grad()
            optimizer.step()

    model, twin = Net(), Net()
    some(model)
    assert launched.count == 5
    monkeypatch.setattr(_torch, "is_for_kernels", lambda _: False)
    some(twin)
    assert_close(model, twin)


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_gradients_now(where: Any, launched: Launched) -> None:
    model = Net()
    handle = gcx.torch.centralize(AdamW(model.parameters()), model, where=where)
    for centralize in (handle.centralize_grads_, lambda: gcx.torch.centralize_grads_(model)):
        launched.count = 0
        give_gradients(model, 0)
        expected = centralized(model.linear.weight.grad)
        centralize()
        assert launched.count == 1
        torch.testing.assert_close(model.linear.weight.grad, expected)


def reproducibly(model: nn.Module) -> None:
    gcx.torch.centralize_grads_(model, reproducible=True)


def test_reproducible_bits(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch's own operations, whatever the strides."""
    models = [Net(odd=True), channels_last(Net(odd=True))]
    for model in models:
        give_gradients(model, 0)
        reproducibly(model)
    assert launched.count == 4
    twin = Net(odd=True)
    give_gradients(twin, 0)
    monkeypatch.setattr(_torch, "is_for_kernels", lambda _: False)
    reproducibly(twin)
    for *found, expected in zip(*(model.parameters() for model in (*models, twin)), strict=True):
        assert all(torch.equal(parameter.grad, expected.grad) for parameter in found)


def sparse(model: Net) -> None:
    model.linear.weight.grad = model.linear.weight.grad.to_sparse()


def replaced(model: Net) -> None:
    model.linear.weight = nn.Parameter(model.linear.weight.detach().clone())


@pytest.mark.parametrize(("spoil", "error"), [(sparse, TypeError), (replaced, RuntimeError)])
def test_errors_come_before_the_launch(
    spoil: Callable[[Net], None], error: type[Exception], launched: Launched
) -> None:
    model = Net()
    optimizer = sgd(model)
    gcx.torch.centralize(optimizer, model)
    for is_spoiled in (False, True):  # in the first step, and in one like the last
        give_gradients(model, 0)
        before = model.conv.weight.grad.clone()
        if is_spoiled:
            spoil(model)
            with pytest.raises(error, match=r"linear\.weight"):
                optimizer.step()
            assert torch.equal(model.conv.weight.grad, before)
        else:
            optimizer.step()
    assert launched.count == 1


def test_copies_launch_for_themselves(launched: Launched) -> None:
    model = Net()
    model.optimizer = sgd(model)
    model.handle = gcx.torch.centralize(model.optimizer, model)
    give_gradients(model, 0)
    model.optimizer.step()
    with pytest.warns(UserWarning, match="does not centralize"):
        twin = copy.deepcopy(model)
    give_gradients(twin, 1)
    grad, expected = model.linear.weight.grad.clone(), centralized(twin.linear.weight.grad)
    twin.handle.centralize_grads_()
    assert launched.count == 2
    torch.testing.assert_close(twin.linear.weight.grad, expected)
    assert torch.equal(model.linear.weight.grad, grad)
