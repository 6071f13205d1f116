"""Gradient Centralization for the Trainer of Hugging Face transformers."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import gcx.torch
from gcx.plan import Plan
from gcx.torch._centralize import Where, check_options
from gcx.torch._optimizer import Decay
from gcx.torch._plan import Layers, Overrides
from gcx.torch._targets import keep_switches

__all__ = ["GradientCentralization"]

_LOG = logging.getLogger(__name__)


class GradientCentralization(TrainerCallback):
    """Callback of a Trainer: its optimizer uses Gradient Centralization while it trains.

    `gcx.torch.centralize` is called for the optimizer when training begins, and undone when it
    ends.

    Parameters
    ----------
    where, decay, layers, overrides, reproducible
        As in `gcx.torch.centralize`. An optimizer that is not one of torch's, such as the
        Adafactor of transformers, has to be told ``decay`` if it has a weight decay.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        When training begins, as `gcx.torch.centralize`.

    See Also
    --------
    gcx.torch.centralize : where it is said what is centralized, and what its options are; without
        a Trainer, it takes the optimizers that Accelerate has prepared as well.
    gcx.torch.plan : what would be centralized.

    Notes
    -----
    Gradients are centralized when the optimizer steps: after accumulation, after averaging over
    workers, after unscaling and after the clipping of the trainer.

    No callback is called when training raises: ``trainer.optimizer`` then goes on centralizing
    until it is trained with again, or ``on_train_end()`` is called.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
    >>> from gcx.transformers import GradientCentralization
    >>> tokens = {"vocab_size": 16, "n_positions": 4, "bos_token_id": 0, "eos_token_id": 0}
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, **tokens))
    >>> sample = torch.randint(16, (4,))
    >>> dataset = [{"input_ids": sample, "labels": sample}]
    >>> quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    >>> machine = {"use_cpu": True, "dataloader_pin_memory": False}
    >>> callback = GradientCentralization(where="update")
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     arguments = TrainingArguments(folder, max_steps=2, **quiet, **machine)
    ...     trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[callback])
    ...     _ = trainer.train()
    {'train_runtime': ...}
    >>> callback.plan
    <gcx plan: 4 of 16 parameters centralized>
    """

    def __init__(
        self,
        *,
        where: Where = "gradient",
        decay: Decay = None,
        layers: Layers = "all",
        overrides: Overrides | None = None,
        reproducible: bool = False,
    ) -> None:
        check_options(where, decay)
        self._centralize = partial(
            gcx.torch.centralize,
            where=where,
            decay=decay,
            layers=layers,
            overrides=overrides,
            reproducible=reproducible,
        )
        self._handle: gcx.torch.GradientCentralization | None = None

    @property
    def plan(self) -> Plan | None:
        """What is centralized and why, in the latest training; None before the first."""
        return None if self._handle is None else self._handle.plan

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the switches of an optimizer of the user, if a checkpoint is loaded into it."""
        del args, state, control
        if kwargs["optimizer"] is not None:
            kwargs["optimizer"].register_load_state_dict_pre_hook(keep_switches)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, into which a checkpoint is loaded by now."""
        del args, control
        self._remove()  # nothing is called after a training that raised
        self._handle = self._centralize(kwargs["optimizer"], kwargs["model"])
        if state.is_world_process_zero:
            _LOG.info("%s", repr(self._handle))  # as it is now

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the optimizer as it was before."""
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
