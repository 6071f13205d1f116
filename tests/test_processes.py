"""The processes on which the tests of distributed training run report what goes wrong."""

from __future__ import annotations

import os
import time

import pytest
from torch import distributed

import processes


def rank_after_barrier(offset: int) -> int:
    distributed.barrier()
    return distributed.get_rank() + offset


def fails_on_the_second() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("this is the second")
    distributed.barrier()


def fails() -> None:
    raise KeyboardInterrupt


def hangs() -> None:
    time.sleep(60)


def crashes() -> None:
    os._exit(3)


@pytest.mark.parametrize("world", [2, 4])
def test_results_come_by_rank(world: int) -> None:
    assert processes.run(world, rank_after_barrier, 10) == [10, 11, 12, 13][:world]


SILENT = r"no answer from processes \[0, 1\]"
SECOND = r"process 1:.*Traceback.*ValueError: this is the second.*no answer from processes \[0\]"
FAILURES = [
    (fails_on_the_second, SECOND),  # for which the other waits
    (fails, "process 0:.*process 1:.*KeyboardInterrupt"),
    (hangs, SILENT),
    (crashes, SILENT),
]


@pytest.mark.parametrize(("function", "message"), FAILURES)
def test_failures_are_told_and_leave_others_in_step(function: object, message: str) -> None:
    limit = 1.0 if message is SILENT else processes.LIMIT
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        processes.run(2, function, limit=limit)
    assert processes.run(2, rank_after_barrier, 0) == [0, 1]
