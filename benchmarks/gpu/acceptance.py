"""The table of all checks on a GPU, and the function that makes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import nan
from time import perf_counter
from typing import NamedTuple

import torch

from benchmarks.command.libraries import LeftOut
from benchmarks.command.progress import track
from benchmarks.command.requirements import CannotRunError
from benchmarks.gpu.device import COPY, Gpu, kernels_alone
from benchmarks.gpu.report import GpuReport, Measured, NotRunError, Row, judged
from benchmarks.throughput.setting import setting, share_gpus
from gcx.__main__ import attempt

__all__ = ["PARTS", "Part", "measure", "name_file", "run"]


class Part(NamedTuple):
    """A part of the table: a function of a file of this package, which gives its rows."""

    name: str
    file: str
    function: str
    needs: tuple[str, ...] = ()  # packages without which it is left out

    @property
    def place(self) -> str:
        """File and function."""
        return f"{self.file}.{self.function}"

    def __call__(self, gpu: Gpu) -> Iterable[Measured]:
        """Measure; what a file needs is imported now, and fails in this part alone."""
        lacking = [package for package in self.needs if find_spec(package) is None]
        if lacking:
            raise NotRunError(f"not installed: {', '.join(lacking)}")
        function: Callable[[Gpu], Iterable[Measured]]
        function = getattr(import_module(f"benchmarks.gpu.{self.file}"), self.function)
        return function(gpu)


PARTS = (
    Part("time on the GPU", "times", "of_models"),
    Part("time of all", "times", "against_loops"),
    Part("time of the host", "launches", "host"),
    Part("launches", "launches", "counted"),
    Part("fused step", "optimizers", "times"),
    Part("fused step", "optimizers", "distances"),
    Part("bits", "bits", "of_torch"),
    Part("bits", "bits", "of_cupy", needs=("cupy",)),
    Part("bits, repeated", "bits", "of_repeats"),
    Part("graphs", "graphs", "replays"),
    Part("addresses", "graphs", "changing_addresses"),
    Part("busy GPU", "programs", "two_streams"),
    Part("busy GPU", "programs", "two_processes"),
    Part("CuPy", "times", "of_cupy", needs=("cupy",)),
    Part("JAX", "on_jax", "times", needs=("jax", "optax")),
    Part("sanitizer", "programs", "memcheck"),
    Part("sanitizer", "programs", "racecheck"),
    Part("fused step", "optimizers", "against_peers"),  # torch.compile takes long
)


# After so long no part goes on, so that there is a report within eight minutes.
_SECONDS = 450


def run(*, command: str, is_brief: bool) -> GpuReport:
    """Check all of it on the first CUDA device.

    Parameters
    ----------
    command : str
        How it was asked for, for the report.
    is_brief : bool
        Whether to measure less.

    Raises
    ------
    CannotRunError
        If there is no CUDA device that torch can use.
    """
    if not torch.cuda.is_available():
        raise CannotRunError(f"there is no CUDA device that torch {torch.__version__} can use")
    if torch.version.hip:
        raise CannotRunError("this is ROCm, where gcx leaves the work to torch's own operations")
    share_gpus()
    start = perf_counter()
    gpu = Gpu(is_brief=is_brief, until=start + _SECONDS)
    before, copy = gpu.state(), gpu.times({})[COPY]
    rows, left_out = measure(gpu, PARTS)
    found, error = attempt(gpu.state)  # raises what a part has broken
    after = found or {"SM clock": f"unknown: {error}"}
    return GpuReport(
        ok=all(row.ok for row in rows),
        setting=setting(command, {gpu.device: torch.cuda.get_device_name(gpu.device)}),
        gpu={
            "CUDA": str(torch.version.cuda),
            **{f"{name} before": value for name, value in before.items()},
            **{f"{name} after": value for name, value in after.items()},
        },
        copy_gigabytes_per_second=1e-9 / copy,
        seconds=perf_counter() - start,
        rows=rows,
        left_out=left_out,
    )


def name_file(report: GpuReport) -> str:
    """Name the file of a report, such as nvidia-h200-check.json."""
    (device,) = report.setting.devices.values()
    return f"{'-'.join(re.findall('[a-z0-9]+', device.lower()))}-check.json"


def measure(gpu: Gpu, parts: Sequence[Part]) -> tuple[tuple[Row, ...], tuple[LeftOut, ...]]:
    """Go through the parts, for as long as there is time.

    A part that raises is a miss, as is one that does not get done; its earlier rows count.
    So is one in which torch's own operations replace the kernels.
    """
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    for part in track(parts, "checking"):
        found: list[Measured] = []
        why_not, error = attempt(partial(_collect, part, gpu, found))
        rows += [judged(part.name, measured) for measured in found]
        if error:
            rows.append(judged(part.name, Measured(part.place, nan, None), error))
        if why_not:
            left_out.append(LeftOut(True, f"{part.name}, {part.place}", why_not))
        attempt(gpu.release)  # raises what a part has broken, which that part has told
    return tuple(rows), tuple(left_out)


def _collect(part: Part, gpu: Gpu, found: list[Measured]) -> str:
    """Put what a part gives into `found`; return the reason if it is optional and gives none."""
    library = "cupy" if "cupy" in part.needs else "torch"
    try:
        rows = part(gpu)  # if its packages are there
        with nullcontext() if "jax" in part.needs else kernels_alone(library, gpu.device):
            _see_that_there_is_time(gpu)
            for measured in rows:
                found.append(measured)
                _see_that_there_is_time(gpu)
    except NotRunError as reason:
        return str(reason)
    return ""


def _see_that_there_is_time(gpu: Gpu) -> None:
    if gpu.seconds_left() < 0:
        raise TimeoutError("the time was up")
