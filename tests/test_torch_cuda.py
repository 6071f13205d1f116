"""The CUDA kernels on a GPU: bits, launches, streams, graphs; all that needs a real one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

import gcx
from gcx.backends import _torch_cuda

from kernel_cases import CASES, DTYPES, assert_same_bits, expected, filled
from torch_kernels import IS_ON_CUDA, on_gpu

pytestmark = IS_ON_CUDA

_FOLDER = Path(__file__).parent

# 54 weights as of ResNet-50, one with rows of odd length.
SHAPES = [(64, 147), *[(256, 64), (64, 576), (512, 1152), (100, 4608)] * 13, (1000, 2048)]


@pytest.fixture(autouse=True)
def kernels() -> None:
    """Without them, all of this would be tested on PyTorch's own operations."""
    assert not _torch_cuda.why_not()


@pytest.fixture
def grads() -> list[Tensor]:
    return [torch.randn(shape, device="cuda") + 1 for shape in SHAPES]


AXES = [(1,)] * len(SHAPES)


def centralize_many(grads: list[Tensor], axes: Any, outs: Any = None) -> list[Tensor]:
    """By the kernels alone: none is left to torch's operations."""
    fan_ins = [(grad.shape, fan_in) for grad, fan_in in zip(grads, axes, strict=True)]
    outs = outs or [None] * len(grads)
    results = _torch_cuda.launch(grads, fan_ins, 1.0, outs, reproducible=False)
    assert all(result is not None for result in results)
    return results


def centralize_(grads: list[Tensor], axes: Any) -> None:
    centralize_many(grads, axes, grads)


def columns(count: int = 8) -> list[Tensor]:
    """Each column lies in several tiles."""
    return [torch.randn(3000, 520 + 32 * k, device="cuda") for k in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(dtype: Any) -> None:
    makers, axes = zip(*CASES.values(), strict=True)
    with torch.device("cuda"):
        tensors = [filled(make(dtype), axes[k], k) for k, make in enumerate(makers)]
    wanted = [expected(grad.cpu(), fan_in) for grad, fan_in in zip(tensors, axes, strict=True)]
    for _ in range(50):
        with torch.device("cuda"):
            again = [make(dtype).copy_(x) for make, x in zip(makers, tensors, strict=True)]
        shapes = [grad.shape for grad in again]
        fan_ins = [*zip(shapes, axes, strict=True)]
        launched = _torch_cuda.launch(again, fan_ins, 1.0, again, reproducible=True)
        for grad, fan_in, result in zip(again, axes, launched, strict=True):
            if result is None:  # left to torch's operations
                gcx.centralize(grad, axis=fan_in, out=grad, reproducible=True)
        for grad, each in zip(again, wanted, strict=True):
            assert_same_bits(grad, each)


@pytest.mark.parametrize("fan_in", [1, 2, 9, 147, 4608, 14336, 16384, 16385, 150528])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_long_fan_ins(dtype: Any, fan_in: int) -> None:
    rows = filled(torch.empty(3, fan_in, dtype=dtype, device="cuda"), (1,))
    turned = rows.t().contiguous()
    wanted = gcx.centralize(rows.cpu(), reproducible=True)
    assert torch.equal(gcx.centralize(rows, reproducible=True).cpu(), wanted)
    found = gcx.centralize(turned, layout="...o", reproducible=True)
    assert torch.equal(found.t().cpu(), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("axes", [(1,), (0,)], ids=str)
def test_not_finite_stays_in_its_unit(axes: Any, bad: float) -> None:
    grad = torch.randn(3000, 4000, device="cuda")
    grad[7, 5] = bad
    centralize_([grad], [axes])
    unit = grad[7] if axes == (1,) else grad[:, 5]
    assert not unit.isfinite().any()
    assert (~grad.isfinite()).sum() == unit.numel()


def test_one_launch_and_no_waiting(grads: list[Tensor]) -> None:
    centralize_(grads, AXES)
    fresh = [grad.clone() for grad in grads]
    for each in (grads, fresh):
        assert on_gpu(lambda: centralize_(each, AXES)).total() == 1  # noqa: B023
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            centralize_(grads, AXES)
            centralize_(fresh, AXES)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_public_functions_launch_the_kernel(grads: list[Tensor]) -> None:
    gcx.centralize_many(grads)
    gcx.centralize(grads[0])
    assert on_gpu(lambda: gcx.centralize_many(grads)).total() == 1
    assert on_gpu(lambda: gcx.centralize(grads[0])).total() == 1


def test_gradients_at_new_addresses_in_each_step(grads: list[Tensor]) -> None:
    kept = []
    for step in range(200):
        new = [grad * (step + 1) for grad in grads]
        wanted = centralize_many(new, AXES)
        centralize_(new, AXES)
        assert all(map(torch.equal, new, wanted))
        kept.append(new[step % len(new)])  # so that addresses do not come back


@pytest.mark.parametrize("make", [columns, lambda: [torch.randn(4000, 999, device="cuda")]])
def test_graph_of_two_lists_is_replayed_on_new_gradients(make: Any) -> None:
    lists = [make(), make()]
    axes = [(0,)] * len(lists[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        centralize_(lists[0], axes)  # as one does before capturing
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for grads in lists:
                centralize_(grads, axes)
        for _ in range(20):
            new = [[torch.randn_like(grad) for grad in grads] for grads in lists]
            for grads, values in zip(lists, new, strict=True):
                for grad, value in zip(grads, values, strict=True):
                    grad.copy_(value)
            graph.replay()
            for grads, values in zip(lists, new, strict=True):
                centralize_(values, axes)
                assert all(map(torch.equal, grads, values))


def test_graph_captured_without_a_first_launch() -> None:
    run_beside("""
        import torch, gcx
        grad = torch.randn(64, 100, device="cuda")
        kept = grad.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gcx.centralize(grad)
        graph.replay()
        torch.testing.assert_close(out, kept - kept.mean(1, keepdim=True))
    """)


def test_streams_at_the_same_time() -> None:
    """The same launches on two streams, with columns, whose sums are left in memory."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    lists = [columns(), columns()]
    wanted = [centralize_many(grads, [(0,)] * 8) for grads in lists]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream, grads in zip(streams, lists, strict=True):
            with torch.cuda.stream(stream):
                copies = [grad.clone() for grad in grads]
                centralize_(copies, [(0,)] * 8)
                found.append(copies)
    torch.cuda.synchronize()
    for k, copies in enumerate(found):
        assert all(map(torch.equal, copies, wanted[k % 2]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_devices() -> None:
    grads = [torch.randn(500, 64, device=f"cuda:{k % 2}") for k in range(6)]
    wanted = [grad - grad.mean(0, keepdim=True) for grad in grads]
    centralize_(grads, [(0,)] * 6)
    torch.testing.assert_close(grads, wanted)
    assert torch.cuda.current_device() == 0


def test_compiled_as_it_was() -> None:
    grad = torch.randn(64, 300, device="cuda")
    compiled = torch.compile(gcx.centralize, fullgraph=True)
    torch.testing.assert_close(compiled(grad), grad - grad.mean(1, keepdim=True))


# Whether tiles of a column wait for each other would show here, as a test that takes for ever: the
# device is full of other work, so that not all of them run at the same time.
_BESIDE_OTHER_WORK = """
    import torch
    import gcx
    torch.manual_seed(0)
    grads = [torch.randn(16000, 640, device="cuda"), torch.randn(5000, 64, device="cuda")]
    wanted = gcx.centralize_many(grads, layouts="...o")
    torch.cuda.synchronize()
    other, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    outs = [torch.empty_like(grad) for grad in grads]
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for step in range(2000):
        with torch.cuda.stream(other):
            busy = torch.tanh(busy @ busy)
        for out in outs:
            out.fill_(float("nan"))
        gcx.centralize_many(grads, layouts="...o", out=outs)
        for out, each in zip(outs, wanted):
            differ += (out != each).sum()
    assert differ.item() == 0
"""


def test_beside_work_that_fills_the_device() -> None:
    run_beside(_BESIDE_OTHER_WORK)


def test_two_processes_at_the_same_time() -> None:
    run_beside(_BESIDE_OTHER_WORK, processes=2)


def run_beside(program: str, processes: int = 1, limit: float = 120.0) -> None:
    """Run a program in processes of their own, and end them if they hang."""
    code = dedent(program)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=_FOLDER, stderr=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    end = time.monotonic() + limit
    try:
        for process in running:
            _, errors = process.communicate(timeout=end - time.monotonic())
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
