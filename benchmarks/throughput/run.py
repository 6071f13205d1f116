"""Every model in every library on every device that there is memory for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

from benchmarks.command.libraries import LeftOut, unusable
from benchmarks.command.progress import track
from benchmarks.command.requirements import CannotRunError, check_picture
from benchmarks.throughput.models import DTYPES, MODELS
from benchmarks.throughput.report import BenchReport, Row
from benchmarks.throughput.setting import setting, share_gpus
from benchmarks.throughput.timing import interleaved
from benchmarks.throughput.workload import COPY, GCX, Workload, load
from gcx.__main__ import attempt, look_up
from gcx.backends import LIBRARIES

__all__ = ["run"]

_OPTIONAL = "bfloat16"  # which not every library has

# What a CPU of two cores does in about a minute.
_ON_CPU = ("resnet50", "vit-b16")

# The gradients, what a copy reads and writes, and the results where nothing is done in place.
_COPIES_IN_MEMORY = 4
_SHARE_OF_MEMORY = 0.5

_SECONDS, _ROUNDS, _HOST_SAMPLES = 1.0, 3, 50


class _Subject(NamedTuple):
    """What one row of the table is about."""

    model: str
    dtype: str
    library: str
    device: str

    def __str__(self) -> str:
        return f"{self.model} in {self.dtype}, {self.library} on {self.device}"


def run(
    *,
    command: str,
    models: Sequence[str] | None = None,
    dtypes: Iterable[str] = DTYPES,
    libraries: Iterable[str] = LIBRARIES,
    gpu_only: bool = False,
    plot: str | None = None,
) -> BenchReport:
    """Measure every library that is installed here, on all of its devices.

    Parameters
    ----------
    command : str
        How it was asked for, for the report.
    models : sequence of str, optional
        Of `benchmarks.throughput.models.MODELS`. By default all of them on GPUs, and the small ones
        on CPUs.
    dtypes : iterable of str, optional
        Of `benchmarks.throughput.models.DTYPES`.
    libraries : iterable of str, optional
        Of `gcx.backends.LIBRARIES`.
    gpu_only : bool, optional
        Leave CPUs out.
    plot : str, optional
        Where to save a bar chart of it.

    Raises
    ------
    CannotRunError
        If the chart could not be written there, or there is no device to measure.
    """
    if plot:
        check_picture("--plot", plot)
    share_gpus()
    found = [look_up(name) for name in libraries]
    places = [
        (library.name, device)
        for library in found
        if library.state == "ok"
        for device in library.devices
        if not (gpu_only and _is_cpu(device))
    ]
    if not places and all(library.state != "broken" for library in found):
        names = ", ".join(library.name for library in found)
        raise CannotRunError(f"none of these has a {'GPU' if gpu_only else 'device'} here: {names}")
    outcomes = []
    for subject in track(list(_subjects(places, models, dtypes)), "measuring"):
        outcomes.append(_outcome(subject))
        attempt(load(subject.library).release)  # raises again what has broken a GPU
    rows = tuple(outcome for outcome in outcomes if isinstance(outcome, Row))
    not_measured = (outcome for outcome in outcomes if isinstance(outcome, LeftOut))
    left_out = (*unusable(found), *_models_left_out(places, models), *not_measured)
    if plot and rows:
        from benchmarks.throughput.plot import save

        save(rows, plot)
    return BenchReport(
        ok=all(item.ok for item in left_out),
        setting=setting(command, _device_names(places)),
        rows=rows,
        left_out=left_out,
        plot=plot if rows else None,
    )


def _subjects(
    places: Sequence[tuple[str, str]], models: Sequence[str] | None, dtypes: Iterable[str]
) -> Iterator[_Subject]:
    for model, dtype, (library, device) in product(models or MODELS, dtypes, places):
        if models or model in _ON_CPU or not _is_cpu(device):
            yield _Subject(model, dtype, library, device)


def _outcome(subject: _Subject) -> Row | LeftOut:
    lack = _lack_of_memory(subject)
    if lack:
        return LeftOut(True, str(subject), lack)
    workload, why = attempt(partial(_workload, subject))
    if workload is None:
        return LeftOut(subject.dtype == _OPTIONAL, str(subject), why)
    row, why = attempt(partial(_measured, subject, workload))
    return row or LeftOut(False, str(subject), why)


def _lack_of_memory(subject: _Subject) -> str:
    """Say why a subject takes too much memory; nothing if it does not."""
    needed = _COPIES_IN_MEMORY * MODELS[subject.model].elements * DTYPES[subject.dtype]
    allowed = _SHARE_OF_MEMORY * load(subject.library).free_bytes(subject.device)
    if needed <= allowed:
        return ""
    return f"takes {needed / 1e9:.1f} GB, and half of what is free is {allowed / 1e9:.1f} GB"


def _workload(subject: _Subject) -> Workload:
    weights = MODELS[subject.model].weights
    return load(subject.library).workload(weights, subject.dtype, subject.device)


def _measured(subject: _Subject, workload: Workload) -> Row:
    times = interleaved(workload.calls, seconds=_SECONDS, rounds=_ROUNDS, clock=workload.clock)
    copy, mine = times.pop(COPY), times.pop(GCX)
    model = MODELS[subject.model]
    moved = 2 * model.elements * DTYPES[subject.dtype]
    call = workload.calls[GCX]
    of_host, launches = workload.host_clock, workload.launches
    return Row(
        model=model.title,
        dtype=subject.dtype,
        library=subject.library,
        device=subject.device,
        weights=len(model.weights),
        bytes=moved,
        microseconds=1e6 * mine,
        gigabytes_per_second=1e-9 * moved / mine,
        copy_gigabytes_per_second=1e-9 * workload.copied / copy,
        over_copy=mine / copy,
        ratios={name: mine / seconds for name, seconds in times.items()},
        host_microseconds=None if of_host is None else 1e6 * of_host(call, _HOST_SAMPLES),
        launches=None if launches is None else launches(call),
    )


def _models_left_out(
    places: Sequence[tuple[str, str]], models: Sequence[str] | None
) -> Iterator[LeftOut]:
    if models is None and any(_is_cpu(device) for _, device in places):
        rest = [model for model in MODELS if model not in _ON_CPU]
        why = f"takes minutes; ask for them with --models {','.join(rest)}"
        yield LeftOut(True, f"{', '.join(rest)} on a CPU", why)


def _device_names(places: Sequence[tuple[str, str]]) -> dict[str, str]:
    return {
        f"{library} {device}": load(library).device_name(device)
        for library, device in places
        if not _is_cpu(device)
    }


def _is_cpu(device: str) -> bool:
    return "cpu" in device.lower()  # JAX calls it TFRT_CPU_0
