"""How often the Triton kernel reads and writes an element, counted where it is interpreted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from torch import Tensor

from gcx.backends._torch_cuda import MultiTensor

from compile_triton import RULES


class Traffic:
    """In the place of the functions of the interpreter that load and store: counts elements."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._starts = np.array([tensor.data_ptr() for tensor in tensors])
        self._stops = self._starts + [tensor.nbytes for tensor in tensors]
        self.loads = np.zeros(len(tensors), int)
        self.stores = np.zeros(len(tensors), int)

    def watch(self, builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(places: Any, mask: Any, *others: Any) -> Any:
            self.loads += self._count(places, mask)
            return load(places, mask, *others)

        def counted_store(places: Any, values: Any, mask: Any, *others: Any) -> Any:
            self.stores += self._count(places, mask)
            return store(places, values, mask, *others)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)

    def _count(self, places: Any, mask: Any) -> Any:
        read = places.data[mask.data.astype(bool)].astype(np.int64)[:, None]
        return ((self._starts <= read) & (read < self._stops)).sum(0)


@pytest.mark.parametrize(
    ("shape", "axes", "sums"),
    [
        ((9, 64), (1,), 0),
        ((3, 4096), (1,), 0),
        ((3, 5000), (1,), 1),
        ((100, 32), (0,), 0),
        ((300, 64), (0,), 1),
        ((17000, 32), (0,), 1),
        ((20, 12, 3), (0, 2), 0),
        ((64,), (), 0),
    ],
    ids=str,
)
def test_adamw_reads_a_gradient_again_only_where_no_tile_holds_its_fan_in(
    interpreter: Any,
    on_cpu: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    sums: int,
) -> None:
    tensors = [torch.ones(shape) for _ in range(4)]
    traffic = Traffic(tensors)
    traffic.watch(interpreter.interpreter_builder, on_cpu)
    roles = [[tensor] for tensor in tensors]
    MultiTensor("adamw", roles, [axes], any_order=False).run(roles, **RULES["adamw"][2])
    size = tensors[0].numel()
    grad, _, *moments = (traffic.loads / size).tolist()  # the compiler drops reads of the weight
    assert [grad, *moments] == [1 + sums, 1, 1]
    assert (traffic.stores / size).tolist() == [0, 1, 1, 1]
