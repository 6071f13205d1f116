"""``python -m benchmarks.gpu.stress DEVICE LAUNCHES``: launches on a GPU that is busy.

Prints how many of them were made and how many gradients came out wrong, as JSON. A process that
does not get done is ended, and shows where it was.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

import gcx
from benchmarks.agreement.canonical import centralized
from benchmarks.agreement.formats import FORMATS
from benchmarks.gpu.device import kernels_alone
from benchmarks.throughput.timing import Call

__all__ = ["stress"]

_SECONDS = 60

# Columns in one tile and in many, and with several segments; then rows.
_SHAPES = ((64, 96), (2304, 64), (4608, 33), (16_385, 40), (40_000, 16))
_WIDTH = 4096  # of the matrices whose products keep the GPU busy


def stress(device: str, launches: int) -> int:
    """Count the gradients that came out wrong."""
    (float32,) = (kind for kind in FORMATS if kind.name == "float32")
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype(np.float32) for shape in _SHAPES]
    columns = [torch.tensor(v, device=device) for v in values]
    rows = [torch.tensor(v.T.copy(), device=device) for v in values]
    expected = [torch.tensor(centralized(v, (0,), float32), device=device) for v in values]
    wanted = [*expected, *(e.T.contiguous() for e in expected)]
    grads, layouts = [*columns, *rows], ["...o"] * len(values) + ["o..."] * len(values)
    out = [torch.empty_like(grad) for grad in grads]
    keep_busy = _work_for_another_stream(device)
    gcx.centralize_many(grads, layouts=layouts, out=out, reproducible=True)  # compiled
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(launches):
        keep_busy()
        for each in out:
            each.fill_(float("nan"))
        gcx.centralize_many(grads, layouts=layouts, out=out, reproducible=True)
        for found, right in zip(out, wanted, strict=True):
            wrong += (found != right).any()
    return int(wrong.item())


def _work_for_another_stream(device: str) -> Call:
    if torch.device(device).type != "cuda":
        return lambda: None
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    one, other, product = (
        torch.ones(_WIDTH, _WIDTH, dtype=torch.bfloat16, device=device) for _ in range(3)
    )

    def work() -> None:
        with torch.cuda.stream(stream):
            torch.matmul(one, other, out=product)

    return work


def main() -> None:
    """Run as a program."""
    device, launches = sys.argv[1], int(sys.argv[2])
    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    # A CPU, as in tests, has no kernels.
    with kernels_alone("torch", device) if device != "cpu" else nullcontext():
        wrong = stress(device, launches)
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.write(json.dumps({"launches": launches, "wrong": wrong}))


if __name__ == "__main__":
    main()
