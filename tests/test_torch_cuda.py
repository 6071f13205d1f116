"""CUDA kernels on a GPU, behind torch: graphs, streams, threads, devices.

``python -m benchmarks gpu --check`` holds more: bits of lists of all kinds 50 times over, addresses
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

import gcx
from gcx.backends import _torch_cuda

from torch_kernels import IS_ON_CUDA

pytestmark = IS_ON_CUDA

_FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def kernels() -> None:
    """Without them, all of this would be tested on PyTorch's own operations."""
    assert not _torch_cuda.why_not()


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
    lists = [[torch.randn(3000, 520 + 32 * k, device="cuda") for k in range(8)] for _ in streams]
    torch.cuda.synchronize()
    wanted = [gcx.centralize_many(grads, layouts="io") for grads in lists]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream, grads in zip(streams, lists, strict=True):
            with torch.cuda.stream(stream):
                copies = [grad.clone() for grad in grads]
                found.append(gcx.centralize_many(copies, layouts="io", out=copies))
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
    gcx.centralize_many(grads, layouts="io", out=grads)
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
