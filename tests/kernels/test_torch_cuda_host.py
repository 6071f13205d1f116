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
from triton.errors import TritonError

import gcx
from gcx.backends import _torch, _torch_cuda, _torch_triton, _triton_kernels
from gcx.backends._torch_cuda import Launches, MultiTensor, centralize_many, takes

from torch_kernels import record

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each launch."""
    return record(monkeypatch)


@pytest.fixture
def in_core(on_cpu: pytest.MonkeyPatch) -> None:
    """Let the core, too, take a CPU for a CUDA device."""
    on_cpu.setattr(Tensor, "is_cuda", True)


def centralized(grad: Tensor, *axes: int) -> Tensor:
    wide = grad.double()
    return (wide - wide.mean(axes, keepdim=True)).to(grad.dtype)


def assert_centralized(found: Tensor, grad: Tensor, *axes: int) -> None:
    torch.testing.assert_close(found, centralized(grad, *axes))


def in_place(grads: list[Tensor]) -> MultiTensor:
    return MultiTensor("centralize", [grads] * 3, [(0,)] * len(grads), any_order=False)


def run(multi_tensor: MultiTensor, grads: list[Tensor]) -> bool:
    return multi_tensor.run([grads] * 3, strength=1.0, rate=0.0)


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


def test_a_second_launch_finds_counters_at_zero(recorded: list[Any]) -> None:
    grad = torch.randn(500, 40)
    kernel = in_place([grad])
    for _ in range(3):
        before = grad.normal_().add_(1).clone()
        run(kernel, [grad])
        assert_centralized(grad, before, 0)
    assert len(recorded[0]["arrivals"]) > 1


def test_addresses_are_sent_when_they_change(device: Any) -> None:
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    kernel = in_place([first])
    run(kernel, [first])
    assert len(device.sent) == 3  # with tiles and matrices
    run(kernel, [first])
    assert len(device.sent) == 3
    before = second.clone()
    run(kernel, [second])
    assert len(device.sent) == 4
    assert_centralized(second, before, 0)


def test_streams_share_nothing_that_changes(device: Any, recorded: list[Any]) -> None:
    grad = torch.randn(500, 40)
    kernel = in_place([grad])
    for device.stream in (1, 2, 2):
        run(kernel, [grad.normal_()])
    first, *others = recorded
    for name in ("addresses", "partials", "arrivals"):
        assert others[0][name] is others[1][name]
        assert others[0][name].data_ptr() != first[name].data_ptr()
    tables = [first["matrices"], first["tiles"]]
    assert [(id(table), stream) for table, stream in device.shared] == [
        (id(table), 2) for table in tables
    ]


def read_by(launch: dict[str, Any]) -> set[int]:
    """Where the tables are that a launch reads."""
    return {launch[name].data_ptr() for name in ("addresses", "matrices", "tiles")}


@pytest.mark.parametrize("is_moved", [False, True])
def test_graph_keeps_what_its_launches_read(
    is_moved: bool, device: Any, recorded: list[Any]
) -> None:
    grad = torch.randn(500, 40)
    kernel = in_place([grad])
    run(kernel, [grad])
    (eager,) = recorded
    device.stream = None
    if is_moved:
        grad = grad.clone()
    before = grad.normal_().clone()
    assert run(kernel, [grad])
    assert_centralized(grad, before, 0)
    captured = recorded[-1]
    assert captured["partials"].data_ptr() != eager["partials"].data_ptr()
    assert captured["arrivals"].data_ptr() != eager["arrivals"].data_ptr()
    assert (captured["addresses"] is eager["addresses"]) == (not is_moved)
    kept = {table.data_ptr() for table in _torch_triton._of_graphs}
    assert read_by(captured) <= kept
    # From where the addresses are sent in each replay.
    assert len(kept & {table.data_ptr() for table in device.pinned}) == is_moved
    device.stream = 0
    run(kernel, [grad.normal_()])
    again = recorded[-1]
    assert captured["addresses"].tolist() == [[grad.data_ptr()]] * 4
    assert again["arrivals"] is eager["arrivals"]


def test_another_graph_needs_another_run_before(device: Any) -> None:
    grads = [torch.randn(4, 8) for _ in range(3)]
    kernel = in_place(grads[:1])
    run(kernel, grads[:1])
    device.stream = None
    assert run(kernel, [grads[1]])
    before = grads[2].clone()
    assert not run(kernel, [grads[2]])
    assert torch.equal(grads[2], before)
    device.stream = 0
    run(kernel, [grads[1]])
    device.stream = None
    assert run(kernel, [grads[2]])


def of_no_run(_: MultiTensor, __: Tensor) -> None:
    """Nothing has run before."""


def of_other_addresses(kernel: MultiTensor, _: Tensor) -> None:
    """Kernels for addresses that are no multiples of 16 are others."""
    run(kernel, [torch.randn(33)[1:].view(4, 8)])


def of_another_rate(kernel: MultiTensor, grad: Tensor) -> None:
    """So are those in which weights count."""
    kernel.run([[grad], [grad.clone()], [grad]], strength=1.0, rate=0.5)


@pytest.mark.parametrize("earlier", [of_no_run, of_other_addresses, of_another_rate])
def test_graph_without_a_run_before_is_left_to_torch(
    earlier: Any, device: Any, recorded: list[Any]
) -> None:
    grad = torch.randn(4, 8)
    kernel = in_place([grad])
    earlier(kernel, grad)
    launches = len(recorded)
    device.stream = None
    before = grad.normal_().clone()
    assert not run(kernel, [grad])
    assert torch.equal(grad, before)
    assert len(recorded) == launches
    assert not _torch_triton._of_graphs


def test_what_is_left_in_a_graph(device: Any) -> None:
    grads = [torch.randn(4, 8), torch.randn(5, 7).double()]
    before = [grad.clone() for grad in grads]
    device.stream = None
    launches = Launches()
    with torch.no_grad():
        assert launches.centralize_(grads, [(1,)] * 2) == [0, 1]
        assert centralize_many(grads, [(1,)] * 2, 1.0, grads) == [None, None]
        assert all(map(torch.equal, grads, before))
        device.stream = 0
        assert launches.centralize_(grads, [(1,)] * 2) == []
        device.stream = None
        assert launches.centralize_([grads[0].clone(), grads[1]], [(1,)] * 2) == []


@pytest.mark.usefixtures("in_core")
@pytest.mark.parametrize("reproducible", [False, True])
def test_public_functions_in_a_graph(device: Any, reproducible: bool) -> None:
    """Torch's own operations, with the bits of the kernel where these are promised."""
    grads = [torch.randn(64, 300), torch.randn(3, 5, 7)]
    wanted = gcx.centralize_many(grads, reproducible=reproducible)
    device.stream = None
    found = gcx.centralize_many([grad.clone() for grad in grads], reproducible=reproducible)
    tolerance = 0.0 if reproducible else 1e-6
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


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


def test_schedules_are_kept_up_to_a_number(on_cpu: pytest.MonkeyPatch) -> None:
    made = []
    make = _torch_cuda.MultiTensor
    on_cpu.setattr(_torch_cuda, "MultiTensor", lambda *a, **k: made.append(a) or make(*a, **k))
    on_cpu.setattr(_torch_cuda, "_MOST_SCHEDULES", 3)
    launches = Launches()
    with torch.no_grad():
        for sizes, count in (((2, 3, 4, 5), 4), ((3, 4, 5), 4), ((2,), 5), ((4, 5, 2), 5)):
            for size in sizes:
                launches.centralize_([torch.randn(2, size)], [(1,)])
            assert len(made) == count


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


def overlapping() -> dict[str, tuple[list[Tensor], list[Tensor | None]]]:
    memory = torch.arange(96.0).view(12, 8) ** 2
    a, b, c = memory.chunk(3)
    return {
        "read after it is written": ([a, b], [b, c]),
        "written after it is read": ([b, a], [c, b]),
        "written twice": ([a, b], [c, c]),
        "in place twice": ([a, a], [a, a]),
        "parts of one another": ([memory[:6], memory[4:]], [memory[:6], memory[4:]]),
        "one within the other": ([memory, b], [memory, b]),
        "of another dtype": ([a, memory[2:6].view(torch.complex64)], [a, None]),
    }


@pytest.mark.usefixtures("in_core")
@pytest.mark.parametrize("name", overlapping())
def test_what_shares_memory_is_left_to_torch(name: str) -> None:
    grads, outs = overlapping()[name]
    assert centralize_many(grads, [(1,)] * 2, 1.0, outs) == [None] * 2
    one_by_one, many = overlapping()[name], overlapping()[name]
    for grad, out in zip(*one_by_one, strict=True):
        _torch.centralize(grad, (1,), 1.0, out, True)
    _torch.centralize_many(many[0], [(1,)] * 2, 1.0, many[1], True)
    for found, wanted in zip(many[0] + many[1], one_by_one[0] + one_by_one[1], strict=True):
        assert found is wanted is None or torch.equal(found, wanted)


def test_what_lies_beside_each_other_is_launched_together(recorded: list[Any]) -> None:
    bucket = torch.randn(12, 8)
    grads = list(bucket.split([5, 4, 3]))
    wanted = [centralized(grad, 1) for grad in grads]
    results = centralize_many([*grads, grads[0]], [(1,)] * 4, 1.0, [None] * 4)
    assert None not in results
    assert (
        centralize_many(grads, [(1,)] * 3, 1.0, [grads[0].view(5, 8), *grads[1:]])[1:] == grads[1:]
    )
    torch.testing.assert_close(grads, wanted)
    assert len(recorded) == 2


def test_what_is_common_to_a_list_is_asked_once(on_cpu: pytest.MonkeyPatch) -> None:
    asked = []
    on_cpu.setattr(_torch_cuda, "why_not", lambda device: asked.append(device) or "")
    grads = [torch.randn(4, k) for k in range(2, 9)]
    centralize_many(grads, [(1,)] * 7, 1.0, grads)
    assert asked == [grads[0].device]
    on_cpu.setattr(_torch_cuda, "why_not", lambda device: "no")
    assert centralize_many(grads, [(1,)] * 7, 1.0, grads) == [None] * 7


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
    lack = _torch_cuda._find_lack.__wrapped__
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


class Failing:
    """In the place of the kernel: cannot be compiled where `VECTOR` is a certain one."""

    def __init__(self, error: type[Exception], vector: int) -> None:
        self._error, self._vector = error, vector
        self.arg_names = _triton_kernels.multi_tensor.arg_names
        self.launches = 0

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **_: Any) -> Any:
        if dict(zip(self.arg_names, arguments, strict=True))["VECTOR"] == self._vector:
            msg = "the compiler is gone\nno compiler of C"
            raise self._error(msg)
        return {grid: self._launch}

    def _launch(self, *_: Any) -> None:
        self.launches += 1


@pytest.mark.parametrize("error", [RuntimeError, OSError, TritonError])
def test_why_not_tells_how_the_kernel_fails(
    on_cpu: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    device = torch.device("cpu")
    try_kernel = _torch_cuda._try_kernel.__wrapped__
    assert not try_kernel(device)
    on_cpu.setattr("triton.knobs.runtime.interpret", False)
    on_cpu.setattr(_triton_kernels, "multi_tensor", Failing(error, vector=1))
    assert try_kernel(device) == "Triton fails: no compiler of C"
    on_cpu.setattr(_triton_kernels, "multi_tensor", Failing(error, vector=2))
    assert try_kernel(device) == "Triton computes something else here"


def test_lack_of_memory_is_no_failure_for_ever(on_cpu: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    on_cpu.setattr(_torch_triton, "_send", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        _torch_cuda._try_kernel.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("failing", [1, 4])
def test_nothing_is_launched_where_one_of_two_launches_fails(
    on_cpu: pytest.MonkeyPatch, failing: int
) -> None:
    on_cpu.setattr("triton.knobs.runtime.interpret", False)
    on_cpu.setattr(_triton_kernels, "multi_tensor", kernel := Failing(RuntimeError, failing))
    grads = [torch.randn(6, 8), torch.randn(5, 7)]
    launches = Launches()
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="left to torch from now on: no compiler of C"):
            assert launches.centralize_(grads, [(1,)] * 2) == [0, 1]
        assert launches.centralize_(grads, [(1,)] * 2) == [0, 1]  # with no further warning
        assert centralize_many(grads[:1], [(1,)], 1.0, [None]) == [None]
    assert kernel.launches == 0
    assert list(_torch_triton.failures.values()) == ["Triton fails: no compiler of C"]
