"""The options of every public function that centralizes, checked once and passed on whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gcx._centralize import check_strength
from gcx._decisions import check_choice
from gcx._names import naming
from gcx.layout import as_layout

Where = Literal["gradient", "update"]
Decay = Literal["inside", "outside"] | None
Layers = Literal["all", "conv"]


@dataclass(frozen=True)
class Options:
    """The options, each checked by itself; an adapter checks them against optimizer and model."""

    where: Where = "gradient"  # or the displacement that the step causes
    decay: Decay = None  # the adapter chooses
    strength: float = 1.0
    layers: Layers = "all"  # or convolutions alone
    overrides: Mapping[Any, Any] | None = None
    reproducible: bool = False

    def __post_init__(self) -> None:
        check_choice("where", self.where, ("gradient", "update"))
        check_choice("decay", self.decay, (None, "inside", "outside"))
        check_choice("layers", self.layers, ("all", "conv"))
        check_choice("reproducible", self.reproducible, (True, False))
        object.__setattr__(self, "strength", check_strength(self.strength))
        if not isinstance(self.overrides, Mapping | None):
            raise TypeError(f"overrides is a mapping from names to layouts, not {self.overrides!r}")
        for key, value in (self.overrides or {}).items():
            if isinstance(value, str):
                with naming(f"overrides: {key}"):
                    as_layout(value)


class TakesOptions:
    """Mixin for the callback of a trainer, whose arguments are the options."""

    def __init__(
        self,
        *,
        where: Where = "gradient",
        decay: Decay = None,
        strength: float = 1.0,
        layers: Layers = "all",
        overrides: Mapping[Any, Any] | None = None,
        reproducible: bool = False,
    ) -> None:
        self._options = Options(where, decay, strength, layers, overrides, reproducible)

    # Python names the callback by this in its error for an unknown option.
    __init__.__qualname__ = "GradientCentralization.__init__"
