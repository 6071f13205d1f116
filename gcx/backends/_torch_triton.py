"""The Triton kernel, launched for lists of tensors: tables, addresses, and memory.

Tables are made once for a list of shapes and strides. From call to call only addresses may change,
and are sent to the device if they do.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from operator import attrgetter, or_
from subprocess import SubprocessError
from typing import Any, NamedTuple
from warnings import warn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gcx.backends import _tiles
from gcx.backends._tiles import Axes
from gcx.backends._triton_rules import RULES, Numbers

# For each thing that the kernel needs (such as gradient and weight), that of all tensors.
Roles = Sequence[Sequence[Tensor]]
Addresses = list[list[int]]  # of the tensors of each role

_ROLES = 4  # of the kernel; the last one is repeated where there are fewer
_WARPS = 8
_SHAPE = attrgetter("shape")
_DTYPE = attrgetter("dtype")
# What the launches in CUDA graphs read: they do so whenever the graph is replayed, and nobody knows
# for how long that goes on.
_of_graphs: list[Tensor] = []
# Why Triton failed on a device in the midst of training; all on it is left to torch since then.
failures: dict[torch.device, str] = {}


class TritonFailsError(Exception):
    """Triton cannot compile a kernel, or load it; nothing has been launched."""


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
        self._rule = RULES[rule, len(roles)]
        self._device = roles[0][0].device
        self._forms = [forms(tensors) for tensors in roles]
        dtypes = [tensors[0].dtype for tensors in roles]
        vector = 16 // min(dtype.itemsize for dtype in dtypes)
        self._launches = [
            _Launch(tables, self._rule.kernel, dtypes, self._device)
            for tables in _tiles.launches(roles[0], axes, vector=vector, any_order=any_order)
        ]
        self._ready: _Ready | None = None
        # Pinned memory for addresses that a CUDA graph is to send, since it can get none itself.
        self._spare: Tensor | None = None

    def fits(self, roles: Roles) -> bool:
        """Whether these tensors are like those that this was made for."""
        return [forms(tensors) for tensors in roles] == self._forms

    def run(self, roles: Roles, **scalars: float) -> bool:
        """Launch, on the current stream.

        Returns
        -------
        bool
            Whether it is launched. If not, nothing has been done, and torch is to do it: a CUDA
            graph is being captured, for which no earlier run has left what it takes (see
            `_to_capture`); or Triton fails on this device, of which the first time warns.
        """
        if self._device in failures:
            return False
        try:
            return self.launch(roles, **scalars)
        except TritonFailsError as error:
            failures[self._device] = f"Triton fails: {error}"
            msg = f"Triton fails on {self._device}, which is left to torch from now on: {error}"
            warn(msg, RuntimeWarning, stacklevel=2)
            return False

    def launch(self, roles: Roles, **scalars: float) -> bool:
        """Do as `run`, but raise a TritonFailsError where Triton fails."""
        numbers = self._rule.numbers(**scalars)
        with _on(self._device):
            stream, addresses = _stream(), _addresses(roles)
            if stream is None:
                ready = self._to_capture(addresses, is_coupled=numbers[1] != 0)
            else:
                ready = self._to_run(addresses, stream)
            if ready is None:
                return False
            # All are compiled before the first one starts.
            starts = [
                launch.compiled(ready, memory, numbers)
                for launch, memory in zip(self._launches, ready.memory, strict=True)
            ]
            for start in starts:
                start()
        for tensors in roles[self._rule.written :]:
            increment_version(tensors)  # so that autograd notices
        return True

    def _to_run(self, addresses: Addresses, stream: int) -> _Ready:
        """Send addresses to the device, unless they are there.

        Everything that changes belongs to one stream, whose order protects it from being changed
        while it is in use.
        """
        last = self._ready
        if last is None or last.stream != stream:
            memory = [launch.memory(stream) for launch in self._launches]
        elif last.addresses != addresses:
            memory = last.memory
        else:
            if self._spare is None:
                self._spare = _pinned(_table(addresses))
            return last
        table = _table(addresses)
        if self._spare is None:
            self._spare = _pinned(table)
        sent = _sent(_pinned(table), self._device, waits=False)
        # Another thread may set its own at any moment.
        ready = self._ready = _Ready(stream, addresses, sent, _are_even(addresses), memory)
        return ready

    def _to_capture(self, addresses: Addresses, *, is_coupled: bool) -> _Ready | None:
        """Collect what a launch in a CUDA graph needs; None if it is not there.

        A graph takes no copies from memory that is not pinned, and none can be pinned while it is
        captured; nor can a kernel be loaded. So all of this must be left from a run before.
        """
        last, is_even = self._ready, _are_even(addresses)
        if last is None or not all(each.has(is_coupled, is_even) for each in self._launches):
            return None
        table = last.table  # never written to again
        if addresses != last.addresses:
            if self._spare is None:
                return None
            host, self._spare = self._spare, None
            table = _sent(host.copy_(_table(addresses)), self._device, waits=False)
            _of_graphs.append(host)
        # Room for sums is the graph's own, with counters that are zero in each replay.
        memory = [launch.memory(None) for launch in self._launches]
        _of_graphs.extend((table, *(tensor for tables in memory for tensor in tables[:2])))
        return _Ready(None, addresses, table, is_even, memory)


class _Memory(NamedTuple):
    """What a launch has on the device: tables, which streams share, and room for their sums."""

    matrices: Tensor
    tiles: Tensor
    sums: Tensor
    arrivals: Tensor


class _Ready(NamedTuple):
    """What belongs to one stream: addresses, here and on the device, and memory of launches."""

    stream: int | None
    addresses: Addresses
    table: Tensor
    is_even: bool  # whether all are multiples of 16 bytes
    memory: list[_Memory]


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
        self._sums_dtype = torch.promote_types(dtypes[0], torch.float32)
        self._device = device
        # On the device from the first time on, and the stream that they were sent on.
        self._tables: tuple[int | None, Tensor, Tensor] | None = None
        # By whether the mean of weights counts, and how many elements are read at once.
        self._compiled: dict[tuple[bool, int], Callable[..., object]] = {}

    def memory(self, stream: int | None) -> _Memory:
        """Provide memory for the current stream, or for a CUDA graph that is captured on it."""
        if self._tables is None:
            matrices, tiles = self._on_cpu.matrices, self._on_cpu.tiles
            self._tables = (stream, _sent(matrices, self._device), _sent(tiles, self._device))
        first, matrices, tiles = self._tables
        if stream not in (None, first):
            _share(matrices)
            _share(tiles)
        slots = self._on_cpu.slots
        sums = torch.empty((slots, 2, _tiles.WIDTH), dtype=self._sums_dtype, device=self._device)
        arrivals = torch.zeros(slots, dtype=torch.int32, device=self._device)
        return _Memory(matrices, tiles, sums, arrivals)

    def has(self, is_coupled: bool, is_even: bool) -> bool:
        """Whether the kernel is there, compiled and loaded."""
        return self._variant(is_coupled, is_even) in self._compiled

    def compiled(self, ready: _Ready, memory: _Memory, numbers: Numbers) -> Callable[[], object]:
        """Return what launches the kernel; a TritonFailsError if it cannot be compiled."""
        strength, rate, others = numbers
        variant = self._variant(rate != 0, ready.is_even)
        arguments = (
            *(ready.table, *memory, ready.table.shape[1]),
            *(strength, rate, others),
            *(self._rule, self._dtypes, *variant, self._on_cpu.tile, _tiles.WIDTH, *self._has),
        )
        # Kept, since that takes a fraction of the time that Triton takes to find it.
        if variant not in self._compiled:
            self._compiled[variant] = self._compile(arguments)
        return partial(self._compiled[variant], *arguments)

    def _variant(self, is_coupled: bool, is_even: bool) -> tuple[bool, int]:
        return is_coupled, self._on_cpu.vector if is_even else 1

    def _compile(self, arguments: Sequence[Any]) -> Callable[..., object]:
        from triton import knobs
        from triton.errors import TritonError

        kernel, grid = self._multi_tensor, (len(self._on_cpu.tiles), 1, 1)
        # Products and sums are rounded one after the other.
        options = {"num_warps": _WARPS, "enable_fp_fusion": False}
        if knobs.runtime.interpret:
            return lambda *arguments: kernel[grid](*arguments, **options)
        try:  # to compile it, and to load it
            return kernel.warmup(*arguments, grid=grid, **options)[grid]  # type: ignore[no-any-return]
        except (TritonError, ImportError, OSError, RuntimeError, SubprocessError) as error:
            raise TritonFailsError(str(error).strip().rpartition("\n")[2]) from error


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


def _addresses(roles: Roles) -> Addresses:
    """List the addresses of each role; for a list with several roles, one and the same list."""
    found: dict[int, list[int]] = {}
    for tensors in roles:
        if id(tensors) not in found:
            found[id(tensors)] = [*map(Tensor.data_ptr, tensors)]
    return [found[id(tensors)] for tensors in roles]


def _table(addresses: Addresses) -> Tensor:
    """Put addresses into a table for the kernel."""
    rows = {id(row): array("q", row) for row in addresses}
    by_role = [*addresses, *addresses[-1:] * (_ROLES - len(addresses))]
    joined = bytearray().join(rows[id(row)] for row in by_role)
    return torch.frombuffer(joined, dtype=torch.int64).view(_ROLES, -1)


def _are_even(addresses: Addresses) -> bool:
    """Whether all are multiples of 16 bytes."""
    return not any(reduce(or_, row) % 16 for row in {id(row): row for row in addresses}.values())


def _on(device: torch.device) -> AbstractContextManager[object]:
    is_current = torch.cuda.current_device() == device.index
    return nullcontext() if is_current else torch.cuda.device(device)


def _stream() -> int | None:
    """Return the current stream; none while a CUDA graph is being captured."""
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream().cuda_stream


def _pinned(table: Tensor) -> Tensor:
    """Copy a table to where a device reads it by itself."""
    return table.pin_memory()


def _sent(table: Tensor, device: torch.device, *, waits: bool = True) -> Tensor:
    """Copy a table to a device; at once, or from pinned memory in the order of the stream."""
    with waiting() if waits else nullcontext():
        return table.to(device, non_blocking=not waits)


@contextmanager
def waiting() -> Iterator[None]:
    """Wait for the device even where the user lets torch raise an error for that."""
    mode = torch.cuda.get_sync_debug_mode()
    if not mode:  # and it is not set without need, since torch warns of that
        yield
        return
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _share(table: Tensor) -> None:
    """Let the current stream read a table of another one: it is not freed before this is done."""
    table.record_stream(torch.cuda.current_stream())
