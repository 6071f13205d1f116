"""Runs that end themselves by SIGKILL, each at another point, in a process of their own."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.paper.cifar100 import runs
from benchmarks.paper.cifar100.archive import read
from benchmarks.paper.cifar100.settings import Setting
from benchmarks.paper.cifar100.training import Data

from small_cifar100 import SmallArchive

# From a process that has imported torch once, and has no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "gcx.torch"])


def die_in_step(count: int) -> None:
    register_optimizer_step_post_hook(_on_call(count))


def die_in_save(count: int) -> None:
    """Half of the checkpoint is on the disk."""
    save, die = torch.save, _on_call(count)

    def save_half(content: object, file: BinaryIO) -> None:
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.fsync(file.fileno())
        die()
        file.seek(0)
        save(content, file)

    torch.save = save_half


def die_before_log(count: int) -> None:
    """The checkpoint is in its place, and the log is not."""
    write_log, die = runs.write_log, _on_call(count)

    def write(*args: Any) -> None:
        die()
        write_log(*args)

    runs.write_log = write


def run_until_killed(
    place: Callable[[int], None],
    count: int,
    setting: Setting,
    written: SmallArchive,
    study: Path,
) -> int | None:
    """Begin a run in another process, and return how that ended."""
    job = {
        "death": partial(place, count),
        "setting": setting,
        "written": written,
        "study": study,
        "threads": torch.get_num_threads(),  # sums may depend on it
    }
    process = PROCESSES.Process(target=_run, kwargs=job)
    process.start()
    process.join()
    return process.exitcode


def _run(
    *,
    death: Callable[[], None],
    setting: Setting,
    written: SmallArchive,
    study: Path,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    death()
    device = torch.device("cpu")
    archive = read(written.folder, written.checksums)
    runs.complete(setting, Data.on(device, archive), study, device)


def _on_call(count: int) -> Callable[..., None]:
    """Make a function that kills the process when it is called for that time."""
    calls = 0

    def die(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return die
