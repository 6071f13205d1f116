"""What a GPU does, as torch sees it: how long, how many kernels, and whether anybody waited."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.throughput.timing import Call, DeviceClock
from benchmarks.throughput.workload import CACHES

__all__ = ["Profile", "clock", "profiled", "summarized", "wait"]

_LABEL = "call under test"


def clock(device: str) -> DeviceClock:
    """Give the clock of a device."""
    size = CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.empty(size, dtype=torch.int8, device=device)
    return DeviceClock(
        flush=other.zero_,
        event=partial(torch.cuda.Event, enable_timing=True),
        milliseconds=lambda start, end: start.elapsed_time(end),
    )


def wait(_: object = None) -> None:
    """Wait until the GPU is done."""
    torch.cuda.synchronize()


@dataclass(frozen=True)
class Profile:
    """What the profiler saw of one call."""

    kernels: int
    copies: int  # and fills of memory
    waits: int  # of the host, for the GPU
    seconds: float  # of all kernels together


def profiled(call: Call) -> Profile:
    """Profile a call that has been made before, so that all is compiled."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(_LABEL):
            call()
        torch.cuda.synchronize()
    return summarized(profiler.events() or ())


def summarized(events: Iterable[Any]) -> Profile:
    """Work out a profile from the events of torch's profiler."""
    events = list(events)
    # Stretches that programs have named, of which there are images on the GPU, too.
    stretches = [event for event in events if event.is_user_annotation]
    names = {stretch.name for stretch in stretches}
    on_gpu = [e for e in events if e.device_type.name == "CUDA" and e.name not in names]
    kernels = [e for e in on_gpu if not e.name.startswith(("Memcpy", "Memset"))]
    (call,) = (e for e in stretches if e.name == _LABEL and e.device_type.name == "CPU")
    start, end = call.time_range.start, call.time_range.end
    waits = [e for e in events if "Synchronize" in e.name and start <= e.time_range.start < end]
    return Profile(
        kernels=len(kernels),
        copies=len(on_gpu) - len(kernels),
        waits=len(waits),
        seconds=1e-6 * sum(kernel.time_range.elapsed_us() for kernel in kernels),
    )
