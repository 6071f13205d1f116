"""The options of every public function that centralizes, checked once and passed on whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gcx._centralize import check_strength
from gcx._decisions import check_choice

Where = Literal["gradient", "update"]
Decay = Literal["inside", "outside"] | None
Layers = Literal["all", "conv"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The choice of weights, the place of the projection, and its strength.

    The constructor checks each option by itself. An adapter checks the options that depend on its
    optimizer or model, such as `decay` and the keys of `overrides`.

    Attributes
    ----------
    where : {"gradient", "update"}
        Project the gradient before the step, or the displacement that the step causes.
    decay : {"inside", "outside"} or None
        Include weight decay in the projection, or not. None leaves the choice to the adapter.
    strength : float
        The part of the mean to subtract, from 0 to 1.
    layers : {"all", "conv"}
        Centralize all layers that have a fan-in, or convolutions alone.
    overrides : mapping or None
        Answers that take precedence over the rules of the layers.
    reproducible : bool
        Sum in one fixed order, which gives equal bits on every device.

    Raises
    ------
    ValueError
        If `where`, `decay` or `layers` has another value, or `strength` is not a number from 0 to
        1.
    TypeError
        If `overrides` is not a mapping.
    """

    where: Where = "gradient"
    decay: Decay = None
    strength: float = 1.0
    layers: Layers = "all"
    overrides: Mapping[Any, Any] | None = None
    reproducible: bool = False

    def __post_init__(self) -> None:
        check_choice("where", self.where, ("gradient", "update"))
        check_choice("decay", self.decay, (None, "inside", "outside"))
        check_choice("layers", self.layers, ("all", "conv"))
        object.__setattr__(self, "strength", check_strength(self.strength))
        if not isinstance(self.overrides, Mapping | None):
            msg = f"overrides is a mapping from names to layouts, not {self.overrides!r}"
            raise TypeError(msg)
