"""DTensors: the processes exchange means, never a gradient."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from gcx.backends._torch_memory import PLAIN, FanIn, sum_over

if TYPE_CHECKING:  # a slow import, and nobody has a DTensor without it
    from torch.distributed.tensor import DTensor, Placement


def is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    """Return True if a tensor is spread over processes."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def check_reproducible(x: DTensor, axes: Sequence[int]) -> None:
    """Raise a TypeError if a fan-in is spread over processes, in an unknown order."""
    if cuts_fan_in(x, axes):
        raise TypeError(
            f"reproducible=True needs each fan-in whole on one process, but over axes "
            f"{tuple(axes)} this DTensor is spread as {tuple(x.placements)}; shard another axis"
        )


def cuts_fan_in(x: DTensor, axes: Sequence[int]) -> bool:
    """Return True if no process has a whole fan-in of a DTensor."""
    return any(each.is_partial() or _cut_axis(each) in axes for each in x.placements)


def _spread(
    here: Tensor,
    like: DTensor,
    shape: Sequence[int] | None = None,
    placements: Sequence[Placement] | None = None,
) -> DTensor:
    """Make a DTensor like another from the part on this process; contiguous if a shape is given."""
    from torch.distributed.tensor import DTensor

    whole = like if shape is None else torch.empty(shape, device="meta")
    placements = placements or like.placements
    return DTensor.from_local(
        here, like.device_mesh, placements, shape=whole.shape, stride=whole.stride()
    )


def see_all(
    tensors: Sequence[Tensor], fan_ins: Sequence[FanIn], like: Sequence[Tensor]
) -> list[Tensor]:
    """Split tensors as their layouts do; take the parts of DTensors here.

    A tensor stays as it is if its fan-ins are cut, or it is spread unlike its gradient `like`.
    """
    return [
        x if type(x) in PLAIN and len(fan_in[0]) == x.ndim else _see_here(x, fan_in, grad)
        for x, fan_in, grad in zip(tensors, fan_ins, like, strict=True)
    ]


def _see_here(x: Tensor, fan_in: FanIn, like: Tensor) -> Tensor:
    shape, axes = fan_in
    if type(x) in PLAIN:
        return x if len(shape) == x.ndim else x.view(shape)
    if len(shape) != x.ndim or not (is_dtensor(x) and is_dtensor(like)):
        return x
    is_alike = x.placements == like.placements and x.device_mesh == like.device_mesh
    return x.to_local() if is_alike and not cuts_fan_in(x, axes) else x


def restore(result: Tensor, grad: Tensor) -> Tensor:
    """Return the tensor whose part is `result`."""
    return _spread(result, grad) if is_dtensor(grad) else result.view(grad.shape)


def of_parts(x: DTensor, mean_here: Callable[[Tensor], Tensor]) -> Tensor:
    """Average the shards of each process, which hold whole fan-ins."""
    here = x.to_local()
    mean = mean_here(here)
    sizes = zip(mean.shape, here.shape, x.shape, strict=True)
    shape = [whole if of_mean == part else of_mean for of_mean, part, whole in sizes]
    return _spread(mean, x, shape)


def is_split(x: Tensor, fan_in: FanIn) -> bool:
    """Return True for a DTensor whose axis 0 the layout splits into groups of fan-in.

    torch refuses to reshape it if a shard ends inside of a group.
    """
    shape, axes = fan_in
    if len(shape) == x.ndim or not is_dtensor(x):
        return False
    return shape[2:] == x.shape[1:] and 1 in axes and 0 not in axes


def fan_in_mean(x: DTensor, axes: Sequence[int]) -> Tensor:
    """Average over `axes`, which stay with size 1; a sharded fan-in gives a partial sum.

    Partial sums are added when the mean is subtracted, so that the processes communicate once.
    """
    # x.mean would gather all of x if the shards of a fan-in are uneven.
    return sum_over(x, tuple(axes)) / prod([x.shape[axis] for axis in axes])


def fan_in_mean_of_groups(x: DTensor, groups: int, axes: Sequence[int]) -> Tensor:
    """Average `x`, seen as (groups, rows, ...), over `axes`; the mean has one row a group."""
    # torch refuses this view if a shard ends inside of a group.
    from torch.distributed.tensor import Partial

    rest = [axis - 1 for axis in axes if axis > 1]
    if groups == len(x):
        return fan_in_mean(x, rest)
    total = sum_over(x, tuple(rest)) if rest else x  # torch takes no axes for all axes
    assert is_dtensor(total)
    here = total.to_local()
    wide = here.to(torch.promote_types(here.dtype, torch.float64))  # adding row after row
    sums = wide.new_zeros(groups, *here.shape[1:]).index_add(0, _group_of_rows(x, groups), wide)
    placements = [Partial() if _cut_axis(p) == 0 else p for p in total.placements]
    spread = _spread(sums.to(here.dtype), x, (groups, *total.shape[1:]), placements)
    return spread / (len(x) // groups * prod([x.shape[axis] for axis in rest]))


def subtract(
    x: DTensor, mean: Tensor, out: Tensor | None, subtract_here: Callable[..., Tensor]
) -> Tensor:
    """Compute ``x - mean``; each process subtracts from its own shard of `x`."""
    assert is_dtensor(mean)
    x_here = x.to_local()
    # FSDP may keep gradients on the CPU, while from_local uses the device of the mesh.
    mean_here = _part_of_mean(mean, x).to(x_here.device)
    if out is x:
        subtract_here(x_here, mean_here, x_here)
        return x
    difference: Tensor = _spread(subtract_here(x_here, mean_here, None), x)
    return difference.to(x_here.device) if out is None else out.copy_(difference)


def _part_of_mean(mean: DTensor, x: DTensor) -> Tensor:
    """Find the means for the shard of `x` on this process."""
    from torch.distributed.tensor import Partial, Replicate

    placements: list[Placement] = []
    of_gradient: list[Placement] = []
    terms = 1
    for k, (of_x, of_mean) in enumerate(zip(x.placements, mean.placements, strict=True)):
        axis = _cut_axis(of_x)
        is_cut = axis is not None and mean.shape[axis] > 1 and not of_mean.is_partial()
        placements.append(of_x if of_mean == of_x or is_cut else Replicate())
        # A whole mean beside a shard of `x`: its gradient here comes from this shard alone.
        of_part = axis is not None and placements[k] == Replicate()
        of_gradient.append(Partial() if of_part else placements[k])
        if of_x == Partial() and of_mean != of_x:
            terms *= x.device_mesh.size(k)
    here = mean.redistribute(placements=placements).to_local(grad_placements=of_gradient)
    if len(mean) not in (1, len(x)):
        here = here[_group_of_rows(x, len(mean))]
    # `x` is a sum of terms, one a process: each subtracts its part of the mean.
    return here if terms == 1 else here / terms


def _group_of_rows(x: DTensor, groups: int) -> Tensor:
    """Find the group of each row in the shard of `x` on this process."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, device = x.device_mesh, x.to_local().device
    group = torch.arange(len(x), device=device) // (len(x) // groups)
    everywhere = DTensor.from_local(group, mesh, [Replicate()] * mesh.ndim)
    # Shard it like `x`, whatever the kind of sharding.
    cut = [p if _cut_axis(p) == 0 else Replicate() for p in x.placements]
    return everywhere.redistribute(placements=cut).to_local().to(device)


def _cut_axis(placement: Placement) -> int | None:
    """Return the axis along which a tensor is sharded, whatever the kind of sharding."""
    return getattr(placement, "dim", None)
