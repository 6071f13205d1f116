"""Tensors spread over processes, as DTensor of torch: means are sent, never a gradient."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:  # it takes long to import, and whoever has a DTensor has imported it
    from torch.distributed.tensor import DTensor, Placement


def is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over processes."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def check_reproducible(x: DTensor, axes: Sequence[int]) -> None:
    """Raise a TypeError if a fan-in is not whole on a process, so that its order is not known."""
    for placement in x.placements:
        if placement.is_partial() or _cut_axis(placement) in axes:
            msg = (
                f"reproducible=True needs each fan-in whole on one process, but over axes "
                f"{tuple(axes)} this DTensor is spread as {tuple(x.placements)}; shard another axis"
            )
            raise TypeError(msg)


def of_parts(x: DTensor, mean_here: Callable[[Tensor], Tensor]) -> Tensor:
    """Means of what each process has, where that is whole fan-ins."""
    from torch.distributed.tensor import DTensor

    here = x.to_local()
    mean = mean_here(here)
    sizes = zip(mean.shape, here.shape, x.shape, strict=True)
    shape = [whole if of_mean == part else of_mean for of_mean, part, whole in sizes]
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        mean, x.device_mesh, x.placements, shape=whole.shape, stride=whole.stride()
    )


def fan_in_mean(x: DTensor, axes: Sequence[int]) -> Tensor:
    """Mean over `axes`, which stay with size 1; along a cut axis, in parts that are to add up.

    They are added up when it is subtracted, so that sums of means are sent once.
    """
    # Not x.mean: where the shards of a fan-in are uneven, that gathers all of x.
    return x.sum(tuple(axes), True) / prod([x.shape[axis] for axis in axes])


def fan_in_mean_of_groups(x: DTensor, groups: int, axes: Sequence[int]) -> Tensor:
    """Mean over `axes` of `x` seen as (groups, rows, ...), in one row a group, else as above."""
    # Not by such a view: shards need not end where a group does, and then torch refuses.
    from torch.distributed.tensor import DTensor, Partial

    rest = [axis - 1 for axis in axes if axis > 1]
    if groups == len(x):
        return fan_in_mean(x, rest)
    total = x.sum(rest, True) if rest else x  # of no axes would be of all
    assert is_dtensor(total)
    here = total.to_local()
    sums = here.new_zeros(groups, *here.shape[1:]).index_add(0, _group_of_rows(x, groups), here)
    whole = torch.empty((groups, *total.shape[1:]), device="meta")
    spread = DTensor.from_local(
        sums,
        x.device_mesh,
        [Partial() if _cut_axis(p) == 0 else p for p in total.placements],
        shape=whole.shape,
        stride=whole.stride(),
    )
    return spread / (len(x) // groups * prod([x.shape[axis] for axis in rest]))


def subtract(
    x: DTensor, mean: Tensor, out: Tensor | None, subtract_here: Callable[..., Tensor]
) -> Tensor:
    """Compute ``x - mean``, each process its own part of `x`."""
    from torch.distributed.tensor import DTensor

    assert is_dtensor(mean)
    x_here = x.to_local()
    # To the CPU, if that is where FSDP keeps gradients: from_local goes to the device of the mesh.
    mean_here = _part_of_mean(mean, x).to(x_here.device)
    if out is x:
        subtract_here(x_here, mean_here, x_here)
        return x
    difference = DTensor.from_local(
        subtract_here(x_here, mean_here, None),
        x.device_mesh,
        x.placements,
        shape=x.shape,
        stride=x.stride(),
    )
    return difference.to(x_here.device) if out is None else out.copy_(difference)


def _part_of_mean(mean: DTensor, x: DTensor) -> Tensor:
    """Give what is to be subtracted from the part of `x` that is here."""
    from torch.distributed.tensor import Partial, Replicate

    placements: list[Placement] = []
    of_gradient: list[Placement] = []
    terms = 1
    for k, (of_x, of_mean) in enumerate(zip(x.placements, mean.placements, strict=True)):
        axis = _cut_axis(of_x)
        is_cut = axis is not None and mean.shape[axis] > 1 and not of_mean.is_partial()
        placements.append(of_x if of_mean == of_x or is_cut else Replicate())
        # Of a whole mean beside a part of `x`, autograd sees here what comes from that part.
        of_part = axis is not None and placements[k] == Replicate()
        of_gradient.append(Partial() if of_part else placements[k])
        if of_x == Partial() and of_mean != of_x:
            terms *= x.device_mesh.size(k)
    here = mean.redistribute(placements=placements).to_local(grad_placements=of_gradient)
    if len(mean) not in (1, len(x)):
        here = here[_group_of_rows(x, len(mean))]
    # A whole mean is shared by the processes whose terms `x` is the sum of.
    return here if terms == 1 else here / terms


def _group_of_rows(x: DTensor, groups: int) -> Tensor:
    """Give the number of the group for each row of `x` that is here."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, device = x.device_mesh, x.to_local().device
    group = torch.arange(len(x), device=device) // (len(x) // groups)
    everywhere = DTensor.from_local(group, mesh, [Replicate()] * mesh.ndim)
    # The same cut again, whatever its kind.
    cut = [p if _cut_axis(p) == 0 else Replicate() for p in x.placements]
    return everywhere.redistribute(placements=cut).to_local().to(device)


def _cut_axis(placement: Placement) -> int | None:
    """Axis along which a tensor is cut into shards, whatever the kind of sharding."""
    return getattr(placement, "dim", None)
