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


def test_failure_of_one_while_another_waits_for_it() -> None:
    with pytest.raises(AssertionError) as caught:
        processes.run(2, fails_on_the_second)
    text = str(caught.value)
    assert "process 1:\nTraceback" in text
    assert "ValueError: this is the second" in text
    assert "no answer from processes [0]" in text
    assert processes.run(2, rank_after_barrier, 0) == [0, 1]


def test_failure_of_all_leaves_them_in_step() -> None:
    with pytest.raises(AssertionError, match=r"(?s)process 0:.*process 1:.*KeyboardInterrupt"):
        processes.run(2, fails)
    assert processes.run(2, rank_after_barrier, 0) == [0, 1]


@pytest.mark.parametrize("function", [hangs, crashes])
def test_no_answer(function: object) -> None:
    with pytest.raises(AssertionError, match=r"no answer from processes \[0, 1\]"):
        processes.run(2, function, limit=1.0)
    assert processes.run(2, rank_after_barrier, 0) == [0, 1]
