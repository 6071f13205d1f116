"""Tensors that torch's kernels take, and those that they leave to torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import gcx
from gcx.backends import _torch_cuda

from torch_kernels import Device, make_device  # noqa: F401 - for the fixture `device`

pytestmark = pytest.mark.usefixtures("device")


def launch(grad: Tensor, axes: tuple[int, ...], out: Tensor | None = None) -> Tensor | None:
    fan_in = (grad.shape, axes)
    (done,) = _torch_cuda.launch([grad], [fan_in], 1.0, [out], reproducible=False)
    return done


def centralized(grad: Tensor, *axes: int) -> Tensor:
    wide = grad.detach().double()
    return (wide - wide.mean(axes, keepdim=True)).to(grad.dtype)


ORDINARY = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

LEFT = {
    "integers": torch.ones(4, 8, dtype=torch.int32),
    "complex": torch.ones(4, 8, dtype=torch.complex64),
    "float8": torch.ones(4, 8).to(torch.float8_e5m2),
    "sparse": torch.eye(4).to_sparse(),
    "of a subclass": ORDINARY.as_subclass(type("Other", (Tensor,), {})),
    "expanded": torch.ones(4, 1).expand(4, 8),
    "overlapping": torch.ones(11).as_strided((4, 8), (1, 1)),
    "to be negated": torch.ones(4, 8, dtype=torch.complex64).conj().imag,
    "zeros that are not there": torch._efficientzerotensor((4, 8)),
    "empty": torch.empty(0, 8),
    "watched": torch.ones(4, 8, requires_grad=True),
    "fan-in of three pieces": torch.ones(4, 2, 3, 2, 3, 2)[:, :, 0],
}


MEMORY, WIDE = torch.zeros(5, 8), torch.zeros(4, 16)[:, :8]
RESULTS_LEFT = {
    "turned": (ORDINARY, torch.zeros(8, 4).t()),
    "overlapping results": (MEMORY[:4], MEMORY[1:]),
    "wide, and a new result would not be": (WIDE, None),
    "other dtype": (ORDINARY, torch.zeros(4, 8).half()),
}


@pytest.mark.parametrize(
    ("grad", "outs"),
    [
        *[pytest.param(grad, (grad, None), id=name) for name, grad in LEFT.items()],
        *[pytest.param(grad, (out,), id=name) for name, (grad, out) in RESULTS_LEFT.items()],
    ],
)
def test_left_to_torch(grad: Tensor, outs: tuple[Tensor | None, ...], device: Device) -> None:
    axes = (1,) if grad.ndim == 2 else (1, 2, 4)
    for out in outs:
        assert launch(grad, axes, out) is None
    assert not device.launches


def test_launched(device: Device) -> None:
    taken = [
        (ORDINARY, None),
        (ORDINARY, torch.empty(4, 8)),
        (torch.nn.Parameter(ORDINARY.clone(), requires_grad=False), None),
        (WIDE, WIDE),
        (copy := ORDINARY.clone(), copy),
    ]
    for grad, out in taken:
        expected = centralized(grad, 1)
        done = launch(grad, (1,), out)
        assert done is not None
        assert out is None or done is out
        torch.testing.assert_close(done, expected)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        with mode:
            done = launch(ORDINARY, (0,))
        assert done is not None
        torch.testing.assert_close(done, centralized(ORDINARY, 0))
    with torch.no_grad():
        assert launch(torch.ones(4, 8, requires_grad=True), (1,)) is not None
    assert device.launches == 9


def test_autograd_sees_the_write() -> None:
    grad = ORDINARY.clone()
    x = torch.ones(4, 8, requires_grad=True)
    product = (x * grad).sum()
    launch(grad, (1,), grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_operations_that_are_recorded(device: Device) -> None:
    seen = 0

    def look(x: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        assert launch(x, (1,)) is None
        return x * 2

    make_fx(look)(ORDINARY)
    torch.vmap(look)(torch.stack([ORDINARY, ORDINARY]))
    torch.func.grad(lambda x: look(x).sum())(ORDINARY)
    torch.jit.trace(look, (ORDINARY,), check_trace=False)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(ORDINARY, ORDINARY))
    assert seen >= 5
    assert not device.launches


def test_lists_may_change_from_call_to_call() -> None:
    grads = [torch.randn(4, 8), torch.randn(5, 7), torch.randn(3, 3), torch.randn(4, 8).double()]
    for chosen in ([0, 1, 2], [1], [2, 0], [3], [0, 1, 2], [2, 1, 0]):
        tensors = [grads[k].normal_().add_(1) for k in chosen]
        expected = [centralized(tensor, 1) for tensor in tensors]
        gcx.centralize_many(tensors, out=tensors)
        torch.testing.assert_close(tensors, expected)


def test_tensors_may_change_from_call_to_call(device: Device) -> None:
    tensors = [torch.randn(4, 8), torch.randn(4, 8)]
    x = tensors[1]

    def replace() -> None:
        x.data = torch.randn(4, 6).double()

    for change in (x.clone, x.t_, lambda: x.resize_(4, 6), replace, x.requires_grad_):
        change()
        for _ in range(2):
            found = gcx.centralize_many(tensors)
            torch.testing.assert_close(found, [centralized(tensor, 1) for tensor in tensors])
            assert [each.requires_grad for each in found] == [False, x.requires_grad]
    assert device.tensors["Store"] == 2 * (4 * 2 + 1)  # all but those that autograd watches


def test_current_stream(device: Device) -> None:
    for stream in (3, 0, 9):
        device.driver.current_stream = stream
        gcx.centralize_many([ORDINARY, torch.ones(300, 8)], layouts=["oi", "io"])
        assert {each.stream for each in device.driver.launches[-3:]} == {stream}


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [
        ("6.0", (9, 0), "ROCm: the kernels are for CUDA"),
        (None, (7, 5), "Old Card is too old for the kernels"),
    ],
)
def test_devices_without_kernels(
    hip: Any, capability: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_torch_cuda, "find_launcher", lambda: pytest.fail("the driver is loaded"))
    assert _torch_cuda.why_not(torch.device("cuda", 0)) == reason


def test_list_like_the_last_one_with_more_than_tensors(device: Device) -> None:
    """Only lists of plain tensors are known again: others have more to check."""
    rows = torch.randn(4, 8)
    for rest in ([None], [np.ones((3, 4), np.float32)], [{"c": rows.clone()}]):
        for _ in range(2):
            first, *_ = gcx.centralize_many([rows.clone(), *rest])
            assert torch.equal(first, gcx.centralize(rows))


def test_list_with_a_gradient_that_the_kernels_leave_is_checked_again(device: Device) -> None:
    grads = [torch.randn(4, 8), torch.randn(4, 8, dtype=torch.complex64)]
    gcx.centralize_many(grads, out=grads)
    before = grads[0].clone().add_(1)
    grads = [before.clone(), grads[1].requires_grad_()]
    with pytest.raises(TypeError, match="cannot be written to"):
        gcx.centralize_many(grads, out=grads)
    assert torch.equal(grads[0], before)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_list(device: Device) -> None:
    traced = torch.jit.trace(lambda x: gcx.centralize_many([x])[0], torch.randn(4, 8))
    x = torch.randn(4, 8)
    torch.testing.assert_close(traced(x), gcx.centralize(x))
