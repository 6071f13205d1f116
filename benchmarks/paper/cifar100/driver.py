"""The study on CIFAR-100, from the archive to the outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper.cells import Outcome
from benchmarks.paper.cifar100.archive import OFFICIAL, Archive, Checksums, read
from benchmarks.paper.cifar100.estimate import random_archive, seconds_of_an_epoch, spoken
from benchmarks.paper.cifar100.grid import CELLS, TABLE_1, TABLE_2, outcomes, settings
from benchmarks.paper.cifar100.log import Epoch
from benchmarks.paper.cifar100.options import STAND_INS
from benchmarks.paper.cifar100.runs import complete, log_of
from benchmarks.paper.cifar100.settings import PAPER, Scale, Setting
from benchmarks.paper.cifar100.stand_ins import as_archive
from benchmarks.paper.cifar100.training import Data
from benchmarks.paper.labels import as_file_name
from benchmarks.paper.report import as_table1, as_table2, write_comparisons
from benchmarks.throughput.timing import machine

__all__ = ["run", "sections"]

_Logs = Mapping[Setting, Sequence[Epoch]]


def run(
    data: Path | None,
    write: Path,
    *,
    seeds: int,
    epochs: int,
    device: str,
    layers: str,
    dry_run: bool,
    after_run: Callable[[list[Outcome]], object] = lambda _: None,
    checksums: Checksums = OFFICIAL,
    scale: Scale = PAPER,
) -> list[Outcome]:
    """Do all runs of both tables that are not done yet, and return the outcomes.

    Parameters
    ----------
    data : Path or None
        Folder with the archive, packed or unpacked, or one of `STAND_INS`. None, for a dry run,
        measures random images.
    write : Path
        Folder for checkpoints and logs; what is there already is gone on from.
    layers : {"conv", "all"}
        What is centralized; the authors' code for CIFAR-100 has convolutions alone.
    dry_run : bool
        Print the grid and its estimated time, write nothing, and return no outcome.
    after_run : callable
        Called after each run with the outcomes so far.
    checksums, scale
        What tests change.

    Raises
    ------
    CannotRunError
        If the archive is not the right one, there is no such GPU, or there are checkpoints of
        other settings in `write`.
    ValueError
        Without `data`, if it is no dry run.
    """
    place = _device(device)
    every = settings(
        seeds=seeds,
        epochs=epochs,
        layers=layers,
        scale=scale,
        precision="bfloat16" if place.type == "cuda" else "float32",
        data=str(data) if str(data) in STAND_INS else checksums.files["train"],
    )
    logs = {setting: log_of(setting, write) for setting in every}
    if dry_run:
        images = Data.on(place, _archive(data, checksums) if data else random_archive())
        is_official = data and str(data) not in STAND_INS
        print(f"images: {data or 'random'}{', which is the right archive' * bool(is_official)}")
        for line in _report(logs, images, place):
            print(line)
        return []
    if data is None:
        raise ValueError("there are no images to train on: name the folder of the archive")
    images = Data.on(place, _archive(data, checksums))
    for so_far in _completed(logs, images, write, place):
        after_run(outcomes(so_far))
    return outcomes(so_far)


def sections(outcomes: Sequence[Outcome], folder: Path, data: Path | None = None) -> Iterator[Path]:
    """Write the tables so far as their runs are finished: of cells with two seeds or more."""
    of = str(data) if str(data) in STAND_INS else "CIFAR-100"
    for number, cells, as_table in ((1, TABLE_1, as_table1), (2, TABLE_2, as_table2)):
        finished = [o for o in outcomes if o.cell in cells and len(o.seeds) > 1]
        if finished:
            named = [replace(o, cell=replace(o.cell, task=of)) for o in finished]
            title, name = f"{of}: Table {number}", f"{as_file_name(of)}-table{number}"
            yield write_comparisons(title, name, named, folder, partial(as_table, unit="epoch"))


def _archive(data: Path, checksums: Checksums) -> Archive:
    return as_archive(str(data)) if str(data) in STAND_INS else read(data, checksums)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CannotRunError(
            f"--device {name}: torch knows no such device; give cuda, cuda:1 or cpu"
        ) from error
    if device.type not in {"cuda", "cpu"}:
        raise CannotRunError(
            f"--device {name}: it runs on no such device; give cuda, cuda:1 or cpu"
        )
    if device.type == "cuda":
        there_are = torch.cuda.device_count()
        if not there_are:
            raise CannotRunError(
                f"--device {name}: torch finds no GPU here; --device cpu is for a trial"
            )
        if (device.index or 0) >= there_are:
            raise CannotRunError(
                f"--device {name}: torch finds {there_are} GPUs here, cuda:0 the first of them"
            )
        torch.backends.cudnn.benchmark = True  # the fastest algorithms: shapes recur
    return device


def _completed(logs: _Logs, data: Data, write: Path, device: torch.device) -> Iterator[_Logs]:
    """Do the epochs that are left, with a bar that shows the time left for all.

    Yields all logs after each run.
    """
    results = dict(logs)
    batches = len(data.images) // next(iter(logs)).scale.batch
    with tqdm(
        total=batches * _epochs_left(logs),
        unit=" batches",
        smoothing=0,  # epochs of training and tests are averaged over
        disable=None,  # where nobody watches
    ) as bar:
        for number, setting in enumerate(logs, 1):
            bar.set_description(f"run {number} of {len(logs)}")
            results[setting] = complete(setting, data, write, device, bar.update)
            bar.write(f"{setting}: {results[setting][-1].test_accuracy:.2f} %")
            yield results


def _report(logs: _Logs, data: Data, device: torch.device) -> Iterator[str]:
    every = list(logs)
    epochs = every[0].epochs
    yield "optimizer  learning rate  weight decay  tables"
    for cell in CELLS:
        tables = [n for n, table in enumerate((TABLE_1, TABLE_2), 1) if cell in table]
        yield (
            f"{cell.optimizer:9}  {cell.learning_rate:<13g}  {cell.weight_decay:<12g}  "
            f"{', '.join(map(str, tables))}"
        )
    arms = ", ".join(dict.fromkeys(setting.arm for setting in every))
    seeds = len({setting.seed for setting in every})
    yield f"arms: {arms}; seeds: 0 to {seeds - 1}; epochs: {epochs}; {len(every)} runs"
    yield f"finished runs: {sum(len(log) == epochs for log in logs.values())}"
    # The last has Gradient Centralization, and Adam, which takes longest.
    seconds = seconds_of_an_epoch(every[-1], data, device)
    yield f"estimated time on {_name(device)}, from a few steps:"
    yield f"  an epoch {spoken(seconds)}, a run {spoken(seconds * epochs)}"
    yield f"  all runs {spoken(seconds * epochs * len(every))}"
    yield f"  what is left to do {spoken(seconds * _epochs_left(logs))}"


def _epochs_left(logs: _Logs) -> int:
    return sum(setting.epochs - len(log) for setting, log in logs.items())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
