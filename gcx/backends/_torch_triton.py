"""The Triton kernel, launched for lists of tensors: rules, tables, and addresses.

Tables are made once for a list of shapes and strides. From call to call only addresses may change,
and are sent to the device if they do.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import attrgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gcx.backends import _tiles
from gcx.backends._tiles import Axes

# For each thing that the kernel needs (such as gradient and weight), that of all tensors.
Roles = Sequence[Sequence[Tensor]]
# Strength of the mean of gradients, rate of that of weights, and what else a rule needs.
Numbers = tuple[float, float, tuple[float, ...]]

_ROLES = 4  # of the kernel; the last one is repeated where there are fewer
_WARPS = 8
_SHAPE = attrgetter("shape")
_DTYPE = attrgetter("dtype")
# Tables that were on their way to a device while a CUDA graph was being captured: the graph reads
# them whenever it is replayed, and nobody knows for how long that goes on.
_of_graphs: list[Tensor] = []


class MultiTensor:
    """Does the same to tensors of the same shapes time after time, in one launch or two.

    Parameters
    ----------
    rule : {"centralize", "sgd", "adamw"}
        What is done with centralized gradients.

        - ``"centralize"`` stores them. Roles: gradients, weights (or the gradients again), results.
          Scalars: `strength`, and `rate`, by which means of weights are subtracted as well.
        - ``"sgd"`` moves weights. Roles: gradients, weights, and momentum buffers if there are any.
          Scalars: `lr`, `momentum`, `dampening`, `weight_decay` (inside the projection),
          `nesterov`, `maximize`, and `first`, whether the buffers are yet to be filled.
        - ``"adamw"`` moves weights. Roles: gradients, weights, first moments, second moments.
          Scalars: `step_size` (learning rate over the first bias correction), `beta1`, `beta2`,
          `eps`, `decay` (learning rate times weight decay), `bias2_root` (root of the second bias
          correction), `maximize`.

    roles : sequence of sequence of Tensor
        A list of tensors for each role. Those at the same position are alike in shape and strides,
        those of a role in dtype; all are on one CUDA device, and `_torch_cuda.takes` takes them.
        No memory is in two places of a role that is written to.
    axes : sequence of tuple of int
        The fan-in axes at each position; none where there is nothing to centralize.
    any_order : bool
        Whether a fan-in may be summed in the order of memory instead of that of the axes.
    """

    def __init__(self, rule: str, roles: Roles, axes: Sequence[Axes], *, any_order: bool) -> None:
        self._rule = _RULES[rule, len(roles)]
        self._device = roles[0][0].device
        self._forms = [forms(tensors) for tensors in roles]
        dtypes = [tensors[0].dtype for tensors in roles]
        vector = 16 // min(dtype.itemsize for dtype in dtypes)
        self._launches = [
            _Launch(tables, self._rule.kernel, dtypes, self._device)
            for tables in _tiles.launches(roles[0], axes, vector=vector, any_order=any_order)
        ]
        self._ready: _Ready | None = None

    def fits(self, roles: Roles) -> bool:
        """Whether these tensors are like those that this was made for."""
        return [forms(tensors) for tensors in roles] == self._forms

    def run(self, roles: Roles, **scalars: float) -> None:
        """Launch, on the current stream."""
        numbers = self._rule.numbers(**scalars)
        with _on(self._device):
            ready = self._made_ready(_addresses(roles))
            for launch, scratch in zip(self._launches, ready.scratch, strict=True):
                launch.run(ready, scratch, numbers)
        for tensors in roles[self._rule.written :]:
            increment_version(tensors)  # so that autograd notices

    def _made_ready(self, addresses: list[list[int]]) -> _Ready:
        """Send addresses to the device, unless they are there.

        Everything that changes belongs to one stream, whose order protects it from being changed
        while it is in use; or to one graph, which may be replayed on any stream at any time.
        """
        stream, last = _stream(), self._ready
        if last is None or stream is None or last.stream != stream:
            scratch = [launch.scratch() for launch in self._launches]
        elif last.addresses != addresses:
            scratch = last.scratch
        else:
            return last
        by_role = [*addresses, *addresses[-1:] * (_ROLES - len(addresses))]
        distinct = {id(row): row for row in by_role}
        rows = {key: array("q", row) for key, row in distinct.items()}
        table = torch.frombuffer(
            bytearray().join(rows[id(row)] for row in by_role), dtype=torch.int64
        ).view(_ROLES, -1)
        is_even = not any(reduce(or_, row) % 16 for row in distinct.values())
        ready = _Ready(stream, addresses, _sent(table, self._device, waits=False), is_even, scratch)
        if stream is not None:
            self._ready = ready
        return ready


class _Ready(NamedTuple):
    """What belongs to one stream: addresses, here and on the device, and memory for sums."""

    stream: int | None
    addresses: list[list[int]]
    table: Tensor
    is_even: bool  # whether all are multiples of 16 bytes
    scratch: list[tuple[Tensor, Tensor]]


class _Launch:
    """One launch, with its tables on the device from the first time on."""

    def __init__(
        self,
        tables: _tiles.Launch,
        kernel: str,
        dtypes: Sequence[torch.dtype],
        device: torch.device,
    ) -> None:
        from triton import language as tl

        from gcx.backends import _triton_kernels

        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        names += names[-1:] * (_ROLES - len(names))
        self._multi_tensor = _triton_kernels.multi_tensor
        self._rule = getattr(_triton_kernels, kernel)
        self._dtypes = tuple(getattr(tl, name) for name in names)
        self._has = (
            not tables.kinds.isdisjoint(_tiles.ALL_GATHERED),
            _tiles.COLUMNS in tables.kinds,
            _tiles.FLAT in tables.kinds,
        )
        self._on_cpu = tables
        self._on_device: tuple[Tensor, Tensor] | None = None
        self._sums_dtype = torch.promote_types(dtypes[0], torch.float32)
        self._device = device
        # By whether the mean of weights counts, and how many elements are read at once.
        self._compiled: dict[tuple[bool, int], Callable[..., object]] = {}

    def scratch(self) -> tuple[Tensor, Tensor]:
        """Make room for partial sums, and counters of the tiles that have left theirs."""
        slots = self._on_cpu.slots
        sums = torch.empty((slots, 2, _tiles.WIDTH), dtype=self._sums_dtype, device=self._device)
        return sums, torch.zeros(slots, dtype=torch.int32, device=self._device)

    def run(self, ready: _Ready, scratch: tuple[Tensor, Tensor], numbers: Numbers) -> None:
        """Launch the kernel."""
        tiles, matrices = self._tables()
        strength, rate, others = numbers
        variant = rate != 0, self._on_cpu.vector if ready.is_even else 1
        arguments = (
            *(ready.table, matrices, tiles, *scratch, ready.table.shape[1]),
            *(strength, rate, others),
            *(self._rule, self._dtypes, *variant, self._on_cpu.tile, _tiles.WIDTH, *self._has),
        )
        if variant in self._compiled:  # a fraction of the time that Triton takes to find it
            self._compiled[variant](*arguments)
            return
        grid = (len(tiles), 1, 1)
        # Products and sums are rounded one after the other.
        options = {"num_warps": _WARPS, "enable_fp_fusion": False}
        compiled = self._multi_tensor[grid](*arguments, **options)
        if compiled is not None:  # as it is where Triton interprets
            self._compiled[variant] = compiled[grid]

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._on_device is not None:
            return self._on_device
        tiles, matrices = self._on_cpu.tiles, self._on_cpu.matrices
        sent = (_sent(tiles, self._device), _sent(matrices, self._device))
        if _stream() is not None:  # otherwise they are there when the graph is replayed
            self._on_device = sent
        return sent


def forms(tensors: Sequence[Tensor]) -> list[Any]:
    """List what the tables depend on, and whether a tensor is an ordinary one.

    This is done in each step of training, so one attribute after the other, which is fastest. That
    a tensor is sparse shows in its strides, which are 0.
    """
    return [
        *map(type, tensors),
        *map(Tensor.get_device, tensors),
        *map(_DTYPE, tensors),
        *map(_SHAPE, tensors),
        *map(Tensor.stride, tensors),
    ]


def _addresses(roles: Roles) -> list[list[int]]:
    """List the addresses of each role; for a list with several roles, one and the same list."""
    found: dict[int, list[int]] = {}
    for tensors in roles:
        if id(tensors) not in found:
            found[id(tensors)] = [*map(Tensor.data_ptr, tensors)]
    return [found[id(tensors)] for tensors in roles]


class _Rule(NamedTuple):
    kernel: str  # function of `_triton_kernels`
    written: int  # the first role that is written to
    numbers: Callable[..., Numbers]


def _for_centralize(*, strength: float, rate: float) -> Numbers:
    return strength, rate, (0.0,)  # the kernel takes some numbers


def _for_sgd(
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> Numbers:
    sign = -1.0 if maximize else 1.0
    others = (sign, weight_decay, lr, momentum, 1 - dampening, first, nesterov)
    return 1.0, sign * weight_decay, tuple(map(float, others))


def _for_adamw(
    *,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    bias2_root: float,
    maximize: bool,
) -> Numbers:
    sign = -1.0 if maximize else 1.0
    others = (sign, decay, step_size, beta1, 1 - beta1, beta2, 1 - beta2, bias2_root, eps)
    return 1.0, 0.0, tuple(map(float, others))


# By name and number of roles.
_RULES = {
    ("centralize", 3): _Rule("store", 2, _for_centralize),
    ("sgd", 2): _Rule("sgd", 1, _for_sgd),
    ("sgd", 3): _Rule("sgd_momentum", 1, _for_sgd),
    ("adamw", 4): _Rule("adamw", 1, _for_adamw),
}


def _on(device: torch.device) -> AbstractContextManager[object]:
    is_current = torch.cuda.current_device() == device.index
    return nullcontext() if is_current else torch.cuda.device(device)


def _stream() -> int | None:
    """Return the current stream; none while a CUDA graph is being captured."""
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream().cuda_stream


def _sent(table: Tensor, device: torch.device, *, waits: bool = True) -> Tensor:
    """Copy a table to a device; at once, or else in the order of the current stream."""
    if _stream() is None:
        _of_graphs.append(table)
        return table.to(device, non_blocking=True)
    return table.to(device) if waits else table.pin_memory().to(device, non_blocking=True)
