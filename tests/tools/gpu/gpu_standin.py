"""Stand-ins for what `benchmarks.gpu` measures: the GPU, gcx and a package beside it."""

from __future__ import annotations

from math import inf
from typing import Any

from benchmarks.gpu.device import Gpu
from benchmarks.throughput.cuda import Profile
from benchmarks.throughput.timing import Call, Clock, wall_clock

PEER = "pytorch_optimizer.optimizer.gradient_centralization"


class StandIn(Gpu):
    """Records nothing, and waits for nothing: every call is back when all is done."""

    seen = Profile(kernels=1, copies=1, waits=0, seconds=1e-6)

    def __init__(self, *, until: float = inf) -> None:
        super().__init__("cpu", is_brief=True, until=until)

    def record(self, call: Call) -> Call:
        return call

    def state(self) -> dict[str, str]:
        return {"SM clock": "1980 MHz of 1980 MHz"}

    def profile(self, call: Call) -> Profile:
        call()
        return self.seen

    def wait(self) -> None: ...

    def release(self) -> None: ...

    def cache_bytes(self) -> int:
        return 4096

    def make_clock(self) -> Clock:
        return wall_clock


def not_centralized(grads: Any, /, *, out: Any = None, **_: Any) -> Any:
    return grads if out is None else out
