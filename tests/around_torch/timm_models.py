"""timm, where torchvision is not installed: it needs that for images, and not for models."""

from __future__ import annotations

from torch import nn

from benchmarks.coverage.stand_ins import import_package

timm = import_package("timm")


def new_model(name: str) -> nn.Module:
    """Make a model by its name, with random weights."""
    model: nn.Module = timm.create_model(name)
    return model
