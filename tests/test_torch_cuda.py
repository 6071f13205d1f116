"""CUDA kernels on a GPU, behind torch: bits, streams, threads, devices.

``python -m benchmarks gpu --check`` holds more: lists of all kinds 50 times over, graphs, addresses
that change, launches and waits, and a GPU that is busy.
"""

from __future__ import annotations

import subprocess
import sys
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
from kernel_cases import ALL, OTHERS, canonical, centralize, numbers
from same_bits import assert_same_bits
from torch_kernels import IS_ON_CUDA, flat_tensor, part_of, to_numpy

pytestmark = IS_ON_CUDA

_FOLDER = Path(__file__).parent

CASES = [case for name, case in OTHERS.items() if "reversed" not in name]  # torch has no such
CASES += [case for case in ALL if case not in OTHERS.values()]


@pytest.fixture(autouse=True)
def kernels() -> None:
    """Without them, all of this would be tested on PyTorch's own operations."""
    assert not _torch_cuda.why_not()


def columns(count: int = 8) -> list[Tensor]:
    """Each column lies in several tiles."""
    return [torch.randn(3000, 520 + 32 * k, device="cuda") for k in range(count)]


def launch(grads: list[Tensor], *, in_place: bool = False) -> list[Tensor]:
    """Centralize columns, by one call."""
    return gcx.centralize_many(grads, layouts="io", out=grads if in_place else None)


def wanted_of(grads: list[Tensor]) -> list[Tensor]:
    """Centralize by the kernels themselves, alone on the device."""
    torch.cuda.synchronize()
    results = launch(grads)
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(dtype: str) -> None:
    wholes = [numbers(case, dtype) for case in CASES]
    expected = [whole.copy() for whole in wholes]
    for case, whole in zip(CASES, expected, strict=True):
        case.part(whole)[...] = canonical(case.part(whole), case)
    flat = [flat_tensor(whole).cuda() for whole in wholes]
    grads = [
        part_of(each, whole, case.part(whole))
        for each, whole, case in zip(flat, wholes, CASES, strict=True)
    ]
    centralize(grads, CASES, grads)
    for each, wanted in zip(flat, expected, strict=True):
        assert_same_bits(to_numpy(each).reshape(wanted.shape), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["oi", "io"])
def test_not_finite_stays_in_its_unit(layout: str, bad: float) -> None:
    grad = torch.randn(3000, 4000, device="cuda")
    grad[7, 5] = bad
    gcx.centralize(grad, layout=layout, out=grad)
    unit = grad[7] if layout == "oi" else grad[:, 5]
    assert not unit.isfinite().any()
    assert (~grad.isfinite()).sum() == unit.numel()


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


def run_beside(program: str) -> None:
    """Run a program in a process of its own, and end it if it hangs."""
    command = [sys.executable, "-c", dedent(program)]
    done = subprocess.run(
        command, cwd=_FOLDER, stderr=subprocess.PIPE, text=True, timeout=120.0, check=False
    )
    assert done.returncode == 0, done.stderr
