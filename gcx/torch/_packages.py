"""What the layers of other packages say about their parameters, found by the names of the classes.

None of the packages is imported, and none needs to be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gcx._rules import Rule
from gcx.plan import LeaveAlone
from gcx.torch._fan_in import FanIn


def _input_first(_: nn.Module) -> Mapping[str, Any]:
    return {"weight": "io", "bias": LeaveAlone("bias")}


PACKAGES: Mapping[str, Rule[FanIn | str | LeaveAlone | None]] = {
    # The linear layer of GPT-2, not a convolution.
    "transformers.pytorch_utils.Conv1D": _input_first,
}
