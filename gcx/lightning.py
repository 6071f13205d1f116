"""Gradient Centralization for the trainers of Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import gcx.torch
from gcx._frameworks import needing
from gcx._options import TakesOptions
from gcx.plan import Plan
from gcx.torch._weights import Targets

with needing("lightning", "lightning"):
    if not TYPE_CHECKING and not find_spec("lightning") and find_spec("pytorch_lightning"):
        import pytorch_lightning as pl  # the same package by its older name
    else:
        import lightning.pytorch as pl

__all__ = ["GradientCentralization"]


class GradientCentralization(TakesOptions, pl.Callback):
    """Callback of a Lightning trainer: its optimizers use Gradient Centralization while it fits.

    `gcx.torch.centralize` is called for each optimizer when fitting starts, and undone when it
    ends, by an exception too. It does not affect testing and predicting. See :doc:`/lightning`.

    Parameters
    ----------
    where, decay, strength, layers, overrides, reproducible
        As in `gcx.torch.centralize`, for all optimizers. One with nothing to centralize is left
        alone beside others, and a parameter group with ``"centralize": False`` always.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an option has no such value; when fitting starts, as `gcx.torch.centralize`.

    Examples
    --------
    >>> from gcx.lightning import GradientCentralization
    >>> callback = GradientCentralization()  # for lightning.Trainer(callbacks=[callback])
    >>> callback.plans  # until it fits
    []
    """

    _handles: Sequence[gcx.torch.GradientCentralization] = ()

    @property
    def plans(self) -> list[Plan]:
        """The plans of the latest fit, one for each optimizer that centralizes."""
        return [handle.plan for handle in self._handles]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizers, before a checkpoint is loaded into them."""
        if not trainer.optimizers:
            raise ValueError("there is nothing to centralize: the trainer has no optimizer")
        options = self._options
        concerned = [o for o in trainer.optimizers if any(Targets(o, pl_module, options).weights())]
        handles = self._handles = []
        for optimizer in concerned or trainer.optimizers:  # an error says why, if none is concerned
            handle = gcx.torch.GradientCentralization(optimizer, pl_module, options)
            handles.append(handle)
            pl.utilities.rank_zero_info(f"{handle}")

    def teardown(self, *_: Any, **__: Any) -> None:
        """Leave the optimizers as they were before."""
        for handle in self._handles:
            handle.remove()

    on_exception = teardown
