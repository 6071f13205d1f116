"""Launches of the Triton kernel for lists of tensors: tables, addresses and memory.

Tables are made once for a list of shapes and strides. Addresses may change from call to call; they
are sent to the device if they do.
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

# A list of tensors for each role: gradients, weights and so on.
Roles = Sequence[Sequence[Tensor]]
Addresses = list[list[int]]  # one list a role

_ROLES = 4  # of the kernel; the last one is repeated if there are fewer
_WARPS = 8
_SHAPE = attrgetter("shape")
_DTYPE = attrgetter("dtype")
# Tensors that captured launches read. They are kept forever: a graph may be replayed at any time.
_of_graphs: list[Tensor] = []
# The reason why Triton failed on a device during training; torch does all the work there since.
failures: dict[torch.device, str] = {}


class TritonFailsError(Exception):
    """Triton cannot compile a kernel, or load it; nothing has been launched."""


class MultiTensor:
    """Applies one rule to lists of tensors of fixed shapes and strides, in one launch or two.

    - ``"centralize"`` stores the centralized gradients. Roles: gradients, weights (or the gradients
      again), results. `rate` is the factor of the mean of weights, which is subtracted as well.
    - ``"sgd"`` moves weights. Roles: gradients, weights, and momentum buffers if there are any.
      `weight_decay` is inside the projection, and `first` is true if the buffers are still empty.
    - ``"adamw"`` moves weights. Roles: gradients, weights, first moments, second moments.
      `step_size` is the learning rate over the first bias correction, `decay` the learning rate
      times weight decay, `bias2_root` the root of the second bias correction.

    Tensors at the same position have one shape and strides; tensors of one role have one dtype. All
    are on one CUDA device, and `_torch_cuda.takes` takes them. Tensors that are written to do not
    overlap. A gradient without axes is left as it is. With `any_order` a fan-in may be summed in
    the order of memory, else it is summed in the order of the axes.
    """

    def __init__(self, rule: str, roles: Roles, axes: Sequence[Axes], *, any_order: bool) -> None:
        self._rule = RULES[rule, len(roles)]
        self._device = roles[0][0].device
        dtypes = [tensors[0].dtype for tensors in roles]
        vector = 16 // min(dtype.itemsize for dtype in dtypes)
        self._launches = [
            _Launch(tables, self._rule.kernel, dtypes, self._device)
            for tables in _tiles.make_tables(roles[0], axes, vector=vector, any_order=any_order)
        ]
        self._ready: _Ready | None = None
        # Pinned memory for the addresses of a CUDA graph: a capture can allocate none.
        self._spare: Tensor | None = None

    def run(self, roles: Roles, **scalars: float) -> bool:
        """Launch on the current stream; return False if nothing was launched, which torch must do.

        Either a CUDA graph is being captured before an ordinary run has prepared it (see
        `_prepare_capture`), or Triton fails on this device. The first failure gives a warning.
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
        """Do the same as `run`, but raise a TritonFailsError if Triton fails."""
        numbers = self._rule.numbers(**scalars)
        with _on(self._device):
            stream, addresses = _stream(), _addresses(roles)
            if stream is None:
                ready = self._prepare_capture(addresses, is_coupled=numbers[1] != 0)
            else:
                ready = self._prepare_run(addresses, stream)
            if ready is None:
                return False
            # Every launch is compiled before the first one starts, so that none is half done.
            starts = [
                launch.compile(ready, memory, numbers)
                for launch, memory in zip(self._launches, ready.memory, strict=True)
            ]
            for start in starts:
                start()
        for tensors in roles[self._rule.written :]:
            increment_version(tensors)  # tells autograd that they have changed
        return True

    def _prepare_run(self, addresses: Addresses, stream: int) -> _Ready:
        """Send addresses to the device, unless they are there.

        Everything that changes belongs to one stream. The stream's order protects it from being
        changed while it is in use.
        """
        last = self._ready
        if last is None or last.stream != stream:
            memory = [launch.memory(stream) for launch in self._launches]
        elif last.addresses != addresses:
            memory = last.memory
        else:
            if self._spare is None:
                self._spare = _pin(_make_table(addresses))
            return last
        table = _make_table(addresses)
        if self._spare is None:
            self._spare = _pin(table)
        sent = _send(_pin(table), self._device, waits=False)
        # A local variable, since another thread may replace the attribute at any moment.
        ready = self._ready = _Ready(stream, addresses, sent, _are_even(addresses), memory)
        return ready

    def _prepare_capture(self, addresses: Addresses, *, is_coupled: bool) -> _Ready | None:
        """Collect the memory for a launch in a CUDA graph; None if an earlier run has left none.

        A graph can copy only from pinned memory. During a capture no memory can be pinned and no
        kernel loaded, so an earlier run must have done both.
        """
        last, is_even = self._ready, _are_even(addresses)
        if last is None or not all(one.is_compiled(is_coupled, is_even) for one in self._launches):
            return None
        table = last.table  # never written to again
        if addresses != last.addresses:
            if self._spare is None:
                return None
            host, self._spare = self._spare, None
            table = _send(host.copy_(_make_table(addresses)), self._device, waits=False)
            _of_graphs.append(host)
        # The graph has partial sums and counters of its own; each replay sets the counters to zero.
        memory = [launch.memory(None) for launch in self._launches]
        _of_graphs.extend((table, *(tensor for tables in memory for tensor in tables[:2])))
        return _Ready(None, addresses, table, is_even, memory)


class _Memory(NamedTuple):
    """Memory of a launch on the device: tables, shared by streams, and buffers for partial sums."""

    matrices: Tensor
    tiles: Tensor
    sums: Tensor
    arrivals: Tensor


class _Ready(NamedTuple):
    """Data of one stream: addresses, on the host and on the device, and memory of launches."""

    stream: int | None
    addresses: Addresses
    table: Tensor
    is_even: bool  # every address is a multiple of 16 bytes
    memory: list[_Memory]


class _Launch:
    """One launch; its tables are sent to the device once."""

    def __init__(
        self,
        tables: _tiles.Tables,
        kernel: str,
        dtypes: Sequence[torch.dtype],
        device: torch.device,
    ) -> None:
        from triton import language as tl

        from gcx.backends import _triton_functions, _triton_kernels

        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        names += names[-1:] * (_ROLES - len(names))
        self._multi_tensor = _triton_kernels.multi_tensor
        self._rule = getattr(_triton_functions, kernel)
        self._dtypes = tuple(getattr(tl, name) for name in names)
        self._has = (
            not tables.kinds.isdisjoint(_tiles.ALL_GATHERED),
            _tiles.COLUMNS in tables.kinds,
            _tiles.FLAT in tables.kinds,
        )
        self._on_cpu = tables
        self._sums_dtype = torch.promote_types(dtypes[0], torch.float32)
        self._device = device
        # The stream on which the tables were sent, and the tables on the device.
        self._tables: tuple[int | None, Tensor, Tensor] | None = None
        # Keyed by the use of the mean of weights, and the number of elements read at once.
        self._compiled: dict[tuple[bool, int], Callable[..., object]] = {}

    def memory(self, stream: int | None) -> _Memory:
        """Provide memory for the current stream, or for a CUDA graph that is captured on it."""
        if self._tables is None:
            matrices, tiles = self._on_cpu.matrices, self._on_cpu.tiles
            self._tables = (stream, _send(matrices, self._device), _send(tiles, self._device))
        first, matrices, tiles = self._tables
        if stream not in (None, first):
            _share(matrices)
            _share(tiles)
        slots = self._on_cpu.slots
        sums = torch.empty((slots, 2, _tiles.WIDTH), dtype=self._sums_dtype, device=self._device)
        arrivals = torch.zeros(slots, dtype=torch.int32, device=self._device)
        return _Memory(matrices, tiles, sums, arrivals)

    def is_compiled(self, is_coupled: bool, is_even: bool) -> bool:
        """Return True if the kernel is compiled and loaded."""
        return self._variant(is_coupled, is_even) in self._compiled

    def compile(self, ready: _Ready, memory: _Memory, numbers: Numbers) -> Callable[[], object]:
        """Return a function that launches the kernel; a TritonFailsError if it does not compile."""
        strength, rate, others = numbers
        variant = self._variant(rate != 0, ready.is_even)
        arguments = (
            *(ready.table, *memory, ready.table.shape[1]),
            *(strength, rate, others),
            *(self._rule, self._dtypes, *variant, self._on_cpu.tile, _tiles.WIDTH, *self._has),
        )
        # Kept here, since Triton's own lookup takes much longer.
        if variant not in self._compiled:
            self._compiled[variant] = self._compile(arguments)
        return partial(self._compiled[variant], *arguments)

    def _variant(self, is_coupled: bool, is_even: bool) -> tuple[bool, int]:
        return is_coupled, self._on_cpu.vector if is_even else 1

    def _compile(self, arguments: Sequence[Any]) -> Callable[..., object]:
        from triton import knobs
        from triton.errors import TritonError

        kernel, grid = self._multi_tensor, (len(self._on_cpu.tiles), 1, 1)
        # Without fusion, a product is rounded before it is added.
        options = {"num_warps": _WARPS, "enable_fp_fusion": False}
        if knobs.runtime.interpret:
            return lambda *arguments: kernel[grid](*arguments, **options)
        try:  # to compile it, and to load it
            return kernel.warmup(*arguments, grid=grid, **options)[grid]  # type: ignore[no-any-return]
        except (TritonError, ImportError, OSError, RuntimeError, SubprocessError) as error:
            raise TritonFailsError(str(error).strip().rpartition("\n")[2]) from error


def forms(tensors: Sequence[Tensor]) -> list[Any]:
    """List the types, devices, dtypes, shapes and strides of tensors: the key of their tables.

    Every training step does this. Going attribute by attribute is fastest. A sparse tensor has
    strides of 0.
    """
    return [
        *map(type, tensors),
        *map(Tensor.get_device, tensors),
        *map(_DTYPE, tensors),
        *map(_SHAPE, tensors),
        *map(Tensor.stride, tensors),
    ]


def _addresses(roles: Roles) -> Addresses:
    """List the addresses of each role; a list in two roles gives one list of addresses."""
    found: dict[int, list[int]] = {}
    for tensors in roles:
        if id(tensors) not in found:
            found[id(tensors)] = [*map(Tensor.data_ptr, tensors)]
    return [found[id(tensors)] for tensors in roles]


def _make_table(addresses: Addresses) -> Tensor:
    """Make the table of addresses for the kernel."""
    rows = {id(row): array("q", row) for row in addresses}
    by_role = [*addresses, *addresses[-1:] * (_ROLES - len(addresses))]
    joined = bytearray().join(rows[id(row)] for row in by_role)
    return torch.frombuffer(joined, dtype=torch.int64).view(_ROLES, -1)


def _are_even(addresses: Addresses) -> bool:
    """Return True if all addresses are multiples of 16 bytes."""
    return not any(reduce(or_, row) % 16 for row in {id(row): row for row in addresses}.values())


def _on(device: torch.device) -> AbstractContextManager[object]:
    is_current = torch.cuda.current_device() == device.index
    return nullcontext() if is_current else torch.cuda.device(device)


def _stream() -> int | None:
    """Return the current stream; None while a CUDA graph is being captured."""
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream().cuda_stream


def _pin(table: Tensor) -> Tensor:
    """Copy a table to page-locked memory, which a device can read."""
    return table.pin_memory()


def _send(table: Tensor, device: torch.device, *, waits: bool = True) -> Tensor:
    """Copy a table to a device. Without waiting, the table must be in pinned memory."""
    with allow_sync() if waits else nullcontext():
        return table.to(device, non_blocking=not waits)


@contextmanager
def allow_sync() -> Iterator[None]:
    """Allow synchronization, even if the user has made it an error in torch."""
    mode = torch.cuda.get_sync_debug_mode()
    if not mode:  # setting it makes torch warn, so it is left alone if possible
        yield
        return
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _share(table: Tensor) -> None:
    """Keep a table of another stream from being freed while the current stream reads it."""
    table.record_stream(torch.cuda.current_stream())
