"""What the host does around the Triton kernel: what it takes, what it keeps, what it sends."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from gcx.backends import _torch_cuda, _torch_triton, _triton_kernels
from gcx.backends._torch_cuda import Launches, MultiTensor, centralize_many, takes

pytestmark = pytest.mark.usefixtures("on_cpu")


class Recorded:
    """In the place of the kernel: launches it, and keeps the arguments."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            named = dict(zip(self._kernel.arg_names, arguments, strict=True))
            self.launches.append({**named, **options})
            self._kernel[grid](*arguments, **options)

        return launch


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    kernel = Recorded(_triton_kernels.multi_tensor)
    monkeypatch.setattr(_triton_kernels, "multi_tensor", kernel)
    return kernel.launches


def centralized(grad: Tensor, *axes: int) -> Tensor:
    wide = grad.double()
    return (wide - wide.mean(axes, keepdim=True)).to(grad.dtype)


def assert_centralized(found: Tensor, grad: Tensor, *axes: int) -> None:
    torch.testing.assert_close(found, centralized(grad, *axes))


def in_place(grads: list[Tensor]) -> MultiTensor:
    return MultiTensor("centralize", [grads] * 3, [(0,)] * len(grads), any_order=False)


def run(multi_tensor: MultiTensor, grads: list[Tensor]) -> None:
    multi_tensor.run([grads] * 3, strength=1.0, rate=0.0)


def test_one_launch_for_all_of_a_dtype(recorded: list[Any]) -> None:
    grads = [torch.randn(8, 4 * k) for k in range(1, 9)] + [torch.randn(4, 8).half()]
    wanted = [centralized(grad, 1) for grad in grads]
    with torch.no_grad():
        assert Launches().centralize_(grads, [(1,)] * len(grads)) == []
    assert len(recorded) == 2
    assert [launch["VECTOR"] for launch in recorded] == [4, 8]
    assert not any(launch["enable_fp_fusion"] for launch in recorded)
    for found, each in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, each)


def test_tensors_of_other_steps_have_a_launch_of_their_own(recorded: list[Any]) -> None:
    grads = [torch.randn(6, 8), torch.randn(5, 7), torch.randn(4, 3, 2)]
    centralize_many(grads, [(1,), (1,), (0, 2)], 1.0, grads)
    assert [launch["VECTOR"] for launch in recorded] == [4, 1]
    assert [launch["HAS_GATHERED"] for launch in recorded] == [False, True]


def test_addresses_decide_whether_16_bytes_are_read_at_once(recorded: list[Any]) -> None:
    memory = torch.randn(65)
    even, odd = memory[:64].view(4, 16), memory[1:].view(4, 16)
    kernel = MultiTensor("centralize", [[even]] * 3, [(1,)], any_order=False)
    for grad, vector in ((even, 4), (odd, 1), (even, 4)):
        wanted = centralized(grad, 1)
        run(kernel, [grad])
        torch.testing.assert_close(grad, wanted)
        assert recorded.pop()["VECTOR"] == vector


def test_a_second_launch_finds_counters_at_zero() -> None:
    grad = torch.randn(500, 40)
    kernel = in_place([grad])
    for _ in range(3):
        before = grad.normal_().add_(1).clone()
        run(kernel, [grad])
        assert_centralized(grad, before, 0)
    ((_, arrivals),) = kernel._ready.scratch
    assert len(arrivals) > 1
    assert not arrivals.any()


def test_addresses_are_sent_when_they_change(on_cpu: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []

    def send(table: Tensor, device: torch.device, *, waits: bool = True) -> Tensor:
        sent.append(table)
        return table.clone()

    on_cpu.setattr(_torch_triton, "_sent", send)
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    kernel = in_place([first])
    run(kernel, [first])
    assert len(sent) == 3  # with tiles and matrices
    run(kernel, [first])
    assert len(sent) == 3
    before = second.clone()
    run(kernel, [second])
    assert len(sent) == 4
    assert_centralized(second, before, 0)


def test_streams_share_nothing_that_changes(on_cpu: pytest.MonkeyPatch) -> None:
    grad = torch.randn(500, 40)
    kernel = in_place([grad])
    kept = []
    for stream in (1, 2, 2):
        on_cpu.setattr(_torch_triton, "_stream", lambda stream=stream: stream)
        run(kernel, [grad.normal_()])
        kept.append(kernel._ready)
    assert kept[1] is kept[2]
    assert kept[0].table is not kept[1].table
    for one, other in zip(kept[0].scratch[0], kept[1].scratch[0], strict=True):
        assert one.data_ptr() != other.data_ptr()


def test_captured_launches_keep_their_tables_for_the_graph(on_cpu: pytest.MonkeyPatch) -> None:
    grad = torch.randn(500, 40)
    kernel = in_place([grad])
    on_cpu.undo()
    on_cpu.setattr(_torch_triton, "_on", lambda device: torch.no_grad())
    on_cpu.setattr(_torch_triton, "_stream", lambda: None)
    on_cpu.setattr(_torch_triton, "_of_graphs", kept := [])
    for launches in (1, 2):
        before = grad.normal_().clone()
        run(kernel, [grad])
        assert_centralized(grad, before, 0)
        assert len(kept) == 3 * launches  # a replay sends them all
    assert kernel._ready is None


def test_versions_of_what_is_written_go_up() -> None:
    roles = [[torch.rand(4, 8)] for _ in range(4)]
    scalars = {"step_size": 0.1, "beta1": 0.5, "beta2": 0.5, "eps": 0.1, "decay": 0.0}
    kernel = MultiTensor("adamw", roles, [(1,)], any_order=True)
    before = [tensor._version for (tensor,) in roles]
    kernel.run(roles, **scalars, bias2_root=1.0, maximize=False)
    assert [tensor._version - old for (tensor,), old in zip(roles, before, strict=True)] == [
        0,
        1,
        1,
        1,
    ]


def test_fits_what_it_was_made_for() -> None:
    grad = torch.randn(4, 8)
    kernel = in_place([grad])
    assert kernel.fits([[torch.randn(4, 8)]] * 3)
    for other in (torch.randn(8, 4), torch.randn(8, 4).t(), grad.double(), grad[:3]):
        assert not kernel.fits([[other]] * 3)
    assert not kernel.fits([[grad, grad]] * 3)


def test_lists_may_change_from_call_to_call() -> None:
    launches = Launches()
    grads = [torch.randn(4, 8), torch.randn(5, 7), torch.randn(3, 3)]
    with torch.no_grad():
        for chosen in ([0, 1, 2], [1], [2, 0], [0, 1, 2]):
            tensors = [grads[k].normal_().add_(1) for k in chosen]
            wanted = [centralized(tensor, 1) for tensor in tensors]
            assert launches.centralize_(tensors, [(1,)] * len(tensors)) == []
            torch.testing.assert_close(tensors, wanted)
        (grad,) = tensors = [torch.randn(4, 8).double()]
        wanted = [centralized(grad, 1)]
        assert launches.centralize_(tensors, [(1,)]) == []
        torch.testing.assert_close(tensors, wanted)


def test_plans_are_kept_up_to_a_number(on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.setattr(_torch_cuda, "_MOST_PLANS", 3)
    launches = Launches()
    with torch.no_grad():
        for size in (2, 3, 4, 5, 2):
            launches.centralize_([torch.randn(2, size)], [(1,)])
    assert len(launches._plans) == 3


def test_positions_that_are_left() -> None:
    grad, other = torch.randn(4, 8), torch.randn(4, 8)
    grads = [grad, torch.randn(4, 8, dtype=torch.complex64), grad, other.expand(4, 8)]
    wanted = centralized(grad, 1)
    with torch.no_grad():
        assert Launches().centralize_(grads, [(1,)] * 4) == [1, 2]
        torch.testing.assert_close(grad, wanted)
        launches = Launches()
        assert launches.centralize_([grad, other], [(1,)] * 2) == []
        assert launches.centralize_([grad, other.to_sparse()], [(1,)] * 2) == [1]
        weights = [torch.randn(4, 8), torch.randn(8, 4).t()]
        assert Launches().centralize_([grad, other], [(1,)] * 2, weights, 0.1) == [1]
    watched = [torch.randn(4, 8, requires_grad=True)]
    assert Launches().centralize_(watched, [(1,)]) == [0]


def test_one_memory_in_two_places_is_centralized_twice() -> None:
    grads = [torch.randn(4, 8), torch.randn(4, 8)]
    out = torch.empty(4, 8)
    results = centralize_many(grads, [(1,)] * 2, 1.0, [out, out])
    assert results[0] is results[1] is out
    assert_centralized(out, grads[1], 1)


ORDINARY = torch.randn(4, 8)

NOT_TAKEN = {
    "integers": torch.ones(4, 8, dtype=torch.int32),
    "complex": torch.ones(4, 8, dtype=torch.complex64),
    "float8": torch.ones(4, 8).to(torch.float8_e5m2),
    "sparse": torch.eye(4).to_sparse(),
    "of a subclass": ORDINARY.as_subclass(type("Other", (Tensor,), {})),
    "expanded": torch.randn(4, 1).expand(4, 8),
    "overlapping": torch.randn(11).as_strided((4, 8), (1, 1)),
    "to be negated": torch.randn(4, 8, dtype=torch.complex64).conj().imag,
    "zeros that are not there": torch._efficientzerotensor((4, 8)),
    "empty": torch.empty(0, 8),
    "watched": torch.randn(4, 8, requires_grad=True),
    "with a fan-in of three pieces": torch.randn(4, 2, 3, 2, 3, 2)[:, :, 0],
}


@pytest.mark.parametrize("grad", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_not_taken(grad: Tensor) -> None:
    axes = (1,) if grad.ndim == 2 else (1, 2, 4)
    assert not takes(grad, axes, grad)


def test_taken() -> None:
    assert takes(ORDINARY, (1,))
    assert takes(ORDINARY, (1,), ORDINARY)
    assert takes(ORDINARY, ())
    assert takes(ORDINARY, (1,), torch.empty(4, 8))
    assert takes(torch.nn.Parameter(ORDINARY, requires_grad=False), (0,))
    with torch.no_grad():
        assert takes(torch.randn(4, 8, requires_grad=True), (1,))
    with torch.inference_mode():
        assert takes(torch.randn(4, 8), (1,))
    with torch.device("meta"):  # a default for what is made here, which the tables are not
        grad = ORDINARY.clone()
        assert takes(grad, (1,), grad)
        centralize_many([grad], [(1,)], 1.0, [grad])
    assert_centralized(grad, ORDINARY, 1)


def test_results_in_memory_of_another_order_are_not_written() -> None:
    assert not takes(ORDINARY, (1,), torch.empty(8, 4).t())
    memory = torch.randn(5, 8)
    assert not takes(memory[:4], (1,), memory[1:])
    assert takes(memory[:4], (1,), memory[:4])
    wide = torch.randn(4, 16)[:, :8]
    assert not takes(wide, (1,))  # empty_like would not be as wide
    assert not takes(wide, ())
    assert takes(wide, (1,), wide)


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_not_taken_where_operations_are_watched() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(takes(x, (1,)))
        return x * 2

    make_fx(look)(ORDINARY)
    torch.vmap(look)(torch.stack([ORDINARY, ORDINARY]))
    torch.func.grad(lambda x: look(x).sum())(ORDINARY)
    torch.jit.trace(look, (ORDINARY,), check_trace=False)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(ORDINARY, ORDINARY))
    assert seen == [False] * len(seen)
    assert len(seen) >= 5


def test_why_not_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    lack = _torch_cuda._lack.__wrapped__
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert lack(device).startswith("ROCm")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert lack(device) == "Old Card is too old for Triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert lack(device) == "Triton interprets (TRITON_INTERPRET is set)"
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert not lack(device)
    monkeypatch.setattr("triton.__version__", "3.1.0")
    assert lack(device) == "Triton 3.1.0 is too old (pip install 'triton>=3.5')"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert lack(device) == "Triton is not installed (pip install triton)"


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_why_not_tells_how_the_kernel_fails(
    on_cpu: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    device = torch.device("cpu")
    try_kernel = _torch_cuda._failure.__wrapped__
    assert not try_kernel(device)

    def fail(*_: object, **__: object) -> None:
        msg = "the compiler is gone\nno compiler of C"
        raise error(msg)

    on_cpu.setattr(_triton_kernels, "multi_tensor", {(1, 1, 1): fail})
    on_cpu.setattr(_torch_cuda, "_plans", {})
    assert try_kernel(device) == "Triton fails: no compiler of C"
    on_cpu.setattr(_torch_cuda, "_plans", {})
    on_cpu.setattr(_triton_kernels, "multi_tensor", {(1, 1, 1): lambda *_, **__: None})
    assert try_kernel(device) == "Triton computes something else here"
