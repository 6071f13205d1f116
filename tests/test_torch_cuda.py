"""CUDA kernels on a GPU, behind torch: bits, streams, graphs, devices."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor

import gcx
from gcx.backends import _torch_cuda

from canonical_order import DTYPES
from kernel_cases import ALL, OTHERS, Case, canonical, centralize, numbers
from same_bits import assert_same_bits
from torch_kernels import IS_ON_CUDA, flat_tensor, no_waiting, on_gpu, part_of, to_numpy

pytestmark = IS_ON_CUDA

_FOLDER = Path(__file__).parent

# 54 weights as of ResNet-50, one with rows of odd length.
SHAPES = [(64, 147), *[(256, 64), (64, 576), (512, 1152), (100, 4608)] * 13, (1000, 2048)]
CASES = [case for name, case in OTHERS.items() if "reversed" not in name]  # torch has no such
CASES += [case for case in ALL if case not in OTHERS.values()]


@pytest.fixture(autouse=True)
def kernels() -> None:
    """Without them, all of this would be tested on PyTorch's own operations."""
    assert not _torch_cuda.why_not()


@pytest.fixture
def grads() -> list[Tensor]:
    return [torch.randn(shape, device="cuda") + 1 for shape in SHAPES]


def columns(count: int = 8) -> list[Tensor]:
    """Each column lies in several tiles."""
    return [torch.randn(3000, 520 + 32 * k, device="cuda") for k in range(count)]


def launch(grads: list[Tensor], *, in_place: bool = False, layout: str = "io") -> list[Tensor]:
    """Centralize columns, by one call."""
    found: list[Tensor] = gcx.centralize_many(
        grads, layouts=layout, out=grads if in_place else None
    )
    return found


def wanted_of(grads: list[Tensor], layout: str = "io") -> list[Tensor]:
    """Centralize by the kernels themselves, alone on the device."""
    torch.cuda.synchronize()
    results = launch(grads, layout=layout)
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(dtype: str) -> None:
    wholes = [numbers(case, dtype) for case in CASES]
    expected = [whole.copy() for whole in wholes]
    for case, whole in zip(CASES, expected, strict=True):
        case.part(whole)[...] = canonical(case.part(whole), case)
    for _ in range(50):
        flat = [flat_tensor(whole).cuda() for whole in wholes]
        grads = [
            part_of(each, whole, case.part(whole))
            for each, whole, case in zip(flat, wholes, CASES, strict=True)
        ]
        centralize(grads, CASES, grads)
        for each, wanted in zip(flat, expected, strict=True):
            assert_same_bits(to_numpy(each).reshape(wanted.shape), wanted)


@pytest.mark.parametrize("fan_in", [2, 9, 147, 4608, 14336, 16384, 16385, 150528])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_long_fan_ins(dtype: str, fan_in: int) -> None:
    case = Case((3, fan_in), (1,))
    whole = numbers(case, dtype)
    rows = flat_tensor(whole).view(3, fan_in).cuda()
    turned = rows.t().contiguous()
    wanted = canonical(whole, case)
    assert_same_bits(to_numpy(gcx.centralize(rows, reproducible=True)), wanted)
    found = gcx.centralize(turned, layout="...o", reproducible=True)
    assert_same_bits(to_numpy(found.t()), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["oi", "io"])
def test_not_finite_stays_in_its_unit(layout: str, bad: float) -> None:
    grad = torch.randn(3000, 4000, device="cuda")
    grad[7, 5] = bad
    gcx.centralize(grad, layout=layout, out=grad)
    unit = grad[7] if layout == "oi" else grad[:, 5]
    assert not unit.isfinite().any()
    assert (~grad.isfinite()).sum() == unit.numel()


def test_one_launch_and_no_waiting(grads: list[Tensor]) -> None:
    launch(grads, in_place=True, layout="oi")
    fresh = [grad.clone() for grad in grads]
    for each in (grads, fresh):
        found = on_gpu(lambda each=each: launch(each, in_place=True, layout="oi"))
        assert found == {"gcx_kernel": 1}  # nothing is copied for new addresses
    assert on_gpu(lambda: gcx.centralize(grads[0]))["gcx_kernel"] == 1
    assert on_gpu(lambda: launch(columns()))["gcx_kernel"] == 2
    with no_waiting():
        for _ in range(3):
            launch(grads, in_place=True, layout="oi")
            launch(fresh, in_place=True, layout="oi")


def test_gradients_at_new_addresses_in_each_step(grads: list[Tensor]) -> None:
    kept = []
    for step in range(200):
        new = [grad * (step + 1) for grad in grads]
        wanted = wanted_of(new, "oi")
        launch(new, in_place=True, layout="oi")
        assert all(map(torch.equal, new, wanted))
        kept.append(new[step % len(new)])  # so that addresses do not come back


@pytest.mark.parametrize("count", [1, 3])
def test_graph_of_lists(count: int) -> None:
    """Several lists in a graph are replayed on new gradients, between other launches."""
    lists = [columns(), [torch.randn(4000, 999, device="cuda")], columns(2)][:count]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for grads in lists:
            launch([grad.clone() for grad in grads], in_place=True)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for grads in lists:
                launch(grads, in_place=True)
        for _ in range(20):
            new = [[torch.randn_like(grad) for grad in grads] for grads in lists]
            for grads, values in zip(lists, new, strict=True):
                for grad, value in zip(grads, values, strict=True):
                    grad.copy_(value)
            graph.replay()
            torch.cuda.empty_cache()
            for grads, values in zip(lists, new, strict=True):
                launch(values, in_place=True)
                assert all(map(torch.equal, grads, values))


def test_graph_captured_without_a_first_launch() -> None:
    run_beside("""
        import pytest, torch, gcx
        grad = torch.randn(64, 100, device="cuda")
        kept = grad.clone()
        graph = torch.cuda.CUDAGraph()
        with pytest.warns(RuntimeWarning, match="before the capture"), torch.cuda.graph(graph):
            out = gcx.centralize(grad)
        graph.replay()
        torch.testing.assert_close(out, kept - kept.mean(1, keepdim=True))
    """)


def test_streams_at_the_same_time() -> None:
    """The sums of columns are left in memory, which streams do not share."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    lists = [columns(), columns()]
    wanted = [wanted_of(grads) for grads in lists]
    found = []
    for _ in range(50):
        for stream, grads in zip(streams, lists, strict=True):
            with torch.cuda.stream(stream):
                copies = [grad.clone() for grad in grads]
                found.append(launch(copies, in_place=True))
    torch.cuda.synchronize()
    for k, copies in enumerate(found):
        assert all(map(torch.equal, copies, wanted[k % 2]))


def test_thread_that_has_not_used_cuda() -> None:
    run_beside("""
        import threading, torch, gcx
        grads = [torch.randn(64, 100, device="cuda"), torch.randn(3000, 40, device="cuda")]
        found = []
        call = lambda: found.extend(gcx.centralize_many(grads, layouts=["oi", "io"]))
        for _ in range(2):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        for k, result in enumerate(found):
            grad = grads[k % 2]
            wanted = grad - grad.mean(1 - k % 2, keepdim=True)
            torch.testing.assert_close(result, wanted)
        assert len(found) == 4
    """)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_devices() -> None:
    grads = [torch.randn(500, 64, device=f"cuda:{k % 2}") for k in range(6)]
    wanted = [grad - grad.mean(0, keepdim=True) for grad in grads]
    launch(grads, in_place=True)
    torch.testing.assert_close(grads, wanted)
    assert torch.cuda.current_device() == 0


def test_compiled_as_it_was() -> None:
    grad = torch.randn(64, 300, device="cuda")
    compiled: Callable[..., Any] = torch.compile(gcx.centralize, fullgraph=True)
    torch.testing.assert_close(compiled(grad), grad - grad.mean(1, keepdim=True))


# If tiles of a column waited for each other, this would take for ever: the device is full of other
# work, so that not all of them run at the same time.
_BESIDE_OTHER_WORK = """
    import torch, gcx
    torch.manual_seed(0)
    grads = [torch.randn(16000, 640, device="cuda"), torch.randn(5000, 64, device="cuda")]
    wanted = gcx.centralize_many(grads, layouts="io")
    torch.cuda.synchronize()
    other, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    outs = [torch.empty_like(grad) for grad in grads]
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for step in range(2000):
        with torch.cuda.stream(other):
            busy = torch.tanh(busy @ busy)
        for out in outs:
            out.fill_(float("nan"))
        gcx.centralize_many(grads, layouts="io", out=outs)
        for out, each in zip(outs, wanted):
            differ += (out != each).sum()
    assert differ.item() == 0
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_beside_work_that_fills_the_device(processes: int) -> None:
    run_beside(_BESIDE_OTHER_WORK, processes)


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
