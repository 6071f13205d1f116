"""Functions run on several processes at once, which know each other as torch.distributed does."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch
from torch import distributed

# Seconds for a task; and for the other processes once one has failed, since they may wait for it.
LIMIT = 60.0
_AFTER_A_FAILURE = 2.0

_HOST = "127.0.0.1"
# Each is forked from one process that has imported what takes long, and done nothing else.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel"])
_groups: dict[int, _Group] = {}


def run(world: int, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
    """Call an importable function on each of `world` processes, and return what each returned.

    The processes start when the first task comes, serve all that follow, and end with this one.
    Raises an AssertionError with the traceback of each process that failed, and the numbers of
    those that did not answer in time. Processes that may be out of step are not used again.
    """
    if world not in _groups:
        _groups[world] = _Group(world)
    answers = _groups[world].ask(pickle.dumps((function, args)), limit)
    silent = sorted(set(range(world)) - set(answers))
    if silent:
        _groups.pop(world).kill()
    failures = [
        f"process {r}:\n{text}" for r, (is_good, text) in sorted(answers.items()) if not is_good
    ]
    if silent:
        failures.append(f"no answer from processes {silent}, which have crashed or were ended")
    if failures:
        raise AssertionError("\n".join(failures))
    return [answers[rank][1] for rank in range(world)]


class _Group:
    """The processes of one world."""

    def __init__(self, world: int) -> None:
        # Kept here, by the process that outlives the others; the system chooses a free port.
        self._store = distributed.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        self._pipes: dict[Connection, int] = {}
        self._processes = []
        for rank in range(world):
            mine, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(rank, world, self._store.port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes[mine] = rank
            self._processes.append(process)

    def ask(self, task: bytes, limit: float) -> dict[int, tuple[bool, Any]]:
        """Answers by rank, of those that answered: whether all went well, and a result or text."""
        for pipe in self._pipes:
            pipe.send_bytes(task)
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = set(self._pipes)
        end = time.monotonic() + limit
        while waiting and (ready := wait(waiting, max(0.0, end - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                waiting.discard(pipe)
                is_good = False
                with suppress(EOFError, ConnectionError):  # a process that crashed
                    is_good, result = pickle.loads(pipe.recv_bytes())
                    answers[self._pipes[pipe]] = is_good, result
                if not is_good:
                    end = min(end, time.monotonic() + _AFTER_A_FAILURE)
        return answers

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    """Do one task after the other until the other end of the pipe is gone."""
    torch.set_num_threads(1)
    # What torchrun sets, and libraries read.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": _HOST, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    store = distributed.TCPStore(_HOST, port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        with _Reporter(pipe) as reporter:
            function, args = pickle.loads(task)
            reporter.report(True, function(*args))


class _Reporter:
    """Tells the other end what a task returned, or whatever it raised."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def report(self, is_good: bool, result: Any) -> None:
        self._pipe.send_bytes(pickle.dumps((is_good, result)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self.report(False, "".join(traceback.format_exception(error)))
        return True
