"""What a launch costs the host, on a CPU: a driver that does nothing stands in for the kernels."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, ExitStack, nullcontext
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

import gcx
from benchmarks.throughput.timing import interleaved
from gcx.backends import _torch, _torch_cuda
from gcx.backends.cuda.launcher import Launcher

__all__ = ["launch_microseconds"]


class _Host:
    """A `gcx.backends.cuda.launcher._Host` that does nothing."""

    def versions(self) -> tuple[int, int]:
        return 13000, 13000

    def compile(self, *_: object) -> bytes:
        return b""

    def load(self, *_: object) -> str:
        return "kernel"

    def launch(self, *_: object) -> None: ...

    def current(self, _: int) -> AbstractContextManager[object]:
        return nullcontext()

    def capability(self, _: int) -> tuple[int, int]:
        return 9, 0

    def stream(self, _: int) -> int:
        return 1

    def is_capturing(self) -> bool:
        return False

    def allocate(self, _: int, size: int) -> tuple[int, object]:
        return 1, size


def launch_microseconds(count: int = 54) -> float:
    """Median time of ``gcx.centralize_many(grads, out=grads)`` on a list like the last one.

    Without garbage collections, as `timeit` measures.
    """
    grads = [torch.ones(8, 4, 3, 3) for _ in range(count)]
    launcher = Launcher(_Host())
    with ExitStack() as stack:
        gc.disable()
        stack.callback(gc.enable)
        folder = stack.enter_context(TemporaryDirectory())
        stack.enter_context(patch.dict("os.environ", XDG_CACHE_HOME=folder))
        for module, name, stand_in in (
            (_torch, "is_for_kernels", lambda _: True),
            (_torch_cuda, "_is_on_cuda", lambda _: True),
            (_torch_cuda, "why_not", lambda _: ""),
            (_torch_cuda, "find_launcher", lambda: launcher),
        ):
            stack.enter_context(patch.object(module, name, stand_in))
        call = {"call": lambda: gcx.centralize_many(grads, out=grads)}
        return 1e6 * interleaved(call, seconds=0.5, repeats=100)["call"]
