"""Outcomes in files, so that a study that was cut short goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.cells import Cell, Outcome

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
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, about=json.dumps({"outcomes": labels, **about}), **arrays)
    unfinished.replace(path)


def load(path: Path) -> tuple[list[Outcome], dict[str, Any]]:
    """Outcomes, and what else was said about them."""
    with np.load(path) as file:
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
