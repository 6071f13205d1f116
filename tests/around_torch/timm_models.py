"""timm, where torchvision is not installed: it needs that for images, and not for models."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn


class _Stub(ModuleType):
    """Of a module: each name in it is a class, and each name in that is text."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NamesAsText(name, (), {"__init__": lambda *_, **__: None})


class _NamesAsText(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StubFinder(MetaPathFinder, Loader):
    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _without_torchvision(name: str) -> Any:
    finder = _StubFinder()
    sys.meta_path.insert(0, finder)
    try:
        return import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for stub in [stub for stub in sys.modules if stub.startswith("torchvision")]:
            del sys.modules[stub]


timm = _without_torchvision("timm")


def new_model(name: str) -> nn.Module:
    """Make a model by its name, with random weights."""
    model: nn.Module = timm.create_model(name)
    return model
