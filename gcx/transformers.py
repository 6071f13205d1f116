"""Gradient Centralization for the Trainer of Hugging Face transformers."""

from __future__ import annotations

import logging
from typing import Any

import gcx.torch
from gcx._frameworks import needing
from gcx._options import TakesOptions
from gcx.plan import Plan
from gcx.torch._step import keep_switches

with needing("transformers", "transformers"):
    from transformers import TrainerCallback, TrainerState

__all__ = ["GradientCentralization"]

_LOG = logging.getLogger(__name__)


class GradientCentralization(TakesOptions, TrainerCallback):
    """Callback of a Trainer: its optimizer uses Gradient Centralization while it trains.

    `gcx.torch.centralize` is called for the optimizer when training begins, and undone when it
    ends; after an error, when you call ``on_train_end()``. See :doc:`/transformers`.

    Parameters
    ----------
    where, decay, strength, layers, overrides, reproducible
        As in `gcx.torch.centralize`. Give ``decay`` for an optimizer with weight decay from another
        package, such as the Adafactor of transformers.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an option has no such value; when training begins, as `gcx.torch.centralize`.

    Examples
    --------
    >>> from gcx.transformers import GradientCentralization
    >>> callback = GradientCentralization(where="update")  # for Trainer(callbacks=[callback])
    >>> callback.plan is None  # until it trains
    True
    """

    _handle: gcx.torch.GradientCentralization | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest training; None before the first."""
        return None if self._handle is None else self._handle.plan

    def on_init_end(self, *_: Any, **kwargs: Any) -> None:
        """Keep the switches of the user's own optimizer when a checkpoint is loaded into it."""
        if kwargs["optimizer"] is not None:
            kwargs["optimizer"].register_load_state_dict_pre_hook(keep_switches)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer; its checkpoint is already loaded."""
        del args, control
        self.on_train_end()  # no callback runs after a training that raised
        self._handle = gcx.torch.GradientCentralization(
            kwargs["optimizer"], kwargs["model"], self._options
        )
        if state.is_world_process_zero:
            _LOG.info("%s", repr(self._handle))  # as it is now

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the optimizer as it was before."""
        if self._handle is not None:
            self._handle.remove()
