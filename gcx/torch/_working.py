"""The optimizer that does the work, where one holds another."""

from __future__ import annotations

from torch.optim import Optimizer


def working(optimizer: Optimizer) -> Optimizer:
    """Find the optimizer that steps and remembers.

    That of torch.distributed.optim.ZeroRedundancyOptimizer is one for the share of a process.
    """
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer
