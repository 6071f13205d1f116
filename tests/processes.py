"""Functions run on several processes at once, which know each other as torch.distributed does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from threading import Thread
from typing import Any

import torch
from torch import distributed

# Seconds for a task; and for the other processes once one has failed, since they may wait for it.
LIMIT = 60.0
_AFTER_A_FAILURE = 2.0

_HOST = "127.0.0.1"
# Each is forked from one process that has imported what takes long, and done nothing else.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel"])
_worlds: dict[int, _World] = {}


def run(world: int, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
    """Call an importable function on each of `world` processes, and return what each returned.

    The processes start when the first task comes, serve all that follow, and end with this one.
    Raises an AssertionError with the traceback of each process that failed, and the numbers of
    those that did not answer in time. Processes that may be out of step are not used again.
    """
    if world not in _worlds:
        _worlds[world] = _World(world)
    futures = _worlds[world].submit(function, *args)
    wait(wait(futures, limit, FIRST_EXCEPTION).not_done, _AFTER_A_FAILURE)
    silent, failures = [], []
    for rank, future in enumerate(futures):
        error = future.exception() if future.done() else BrokenProcessPool()
        if isinstance(error, BrokenProcessPool):
            silent.append(rank)
        elif error is not None:
            failures.append(f"process {rank}:\n{''.join(traceback.format_exception(error))}")
    if silent:
        _worlds.pop(world).kill()
        failures.append(f"no answer from processes {silent}, which have crashed or were ended")
    if failures:
        raise AssertionError("\n".join(failures))
    return [future.result() for future in futures]


class _World:
    """A pool for each process, so that each gets every task."""

    def __init__(self, world: int) -> None:
        # Kept here, by the process that outlives the others; the system chooses a free port.
        self._store = distributed.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        self._pools = [
            ProcessPoolExecutor(1, _context, _join, (rank, world, self._store.port))
            for rank in range(world)
        ]
        self._pids = [future.result(LIMIT) for future in self.submit(os.getpid)]

    def submit(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [pool.submit(function, *args) for pool in self._pools]

    def kill(self) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):  # it has crashed
                os.kill(pid, signal.SIGKILL)


def _join(rank: int, world: int, port: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # What torchrun sets, and libraries read.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": _HOST, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    store = distributed.TCPStore(_HOST, port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)


def _end_with_parent() -> None:
    """A pool ends its process, unless it is killed itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
