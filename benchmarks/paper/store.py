"""Outcomes in files, so that a study that was cut short goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper.cells import Cell, Outcome
from benchmarks.paper.files import write_whole

__all__ = ["load", "save"]


def save(path: Path, outcomes: Sequence[Outcome], **about: Any) -> None:
    """Write all or nothing; `about` is whatever JSON can hold."""
    labels = [
        {"cell": asdict(outcome.cell), "arm": outcome.arm, "seeds": outcome.seeds}
        for outcome in outcomes
    ]
    arrays = {
        f"{name}{index}": getattr(outcome, name)
        for index, outcome in enumerate(outcomes)
        for name in ("accuracy", "loss", "checkpoints")
    }
    content = json.dumps({"outcomes": labels, **about})
    write_whole(path, lambda file: np.savez_compressed(file, about=content, **arrays))


def load(path: Path) -> tuple[list[Outcome], dict[str, Any]]:
    """Outcomes, and what else was said about them.

    Raises
    ------
    CannotRunError
        If the file is not a whole one.
    """
    try:
        return _load(path)
    except (BadZipFile, EOFError, KeyError, OSError, ValueError) as error:
        raise CannotRunError(
            f"{path} cannot be read ({error}): delete it, and its runs are done again"
        ) from error


def _load(path: Path) -> tuple[list[Outcome], dict[str, Any]]:
    with path.open("rb") as content, np.load(content) as file:
        about: dict[str, Any] = json.loads(str(file["about"]))
        outcomes = [
            Outcome(
                cell=Cell(**label["cell"]),
                arm=label["arm"],
                seeds=tuple(label["seeds"]),
                accuracy=file[f"accuracy{index}"],
                loss=file[f"loss{index}"],
                checkpoints=file[f"checkpoints{index}"],
            )
            for index, label in enumerate(about.pop("outcomes"))
        ]
    return outcomes, about
