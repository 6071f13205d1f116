"""Import packages that ask for torchvision or torchaudio, where these are not installed."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["import_package"]

# Needed for images and sounds, and not for models. PyPI has no build of them for a CPU alone.
_DATA = ("torchvision", "torchaudio")


class _Stub(ModuleType):
    """Of a module: each name in it is a class, and each name in that is text."""

    __version__ = "0.0"

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
        return ModuleSpec(name, self, is_package=True) if _is_data(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _is_data(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _DATA


def import_package(name: str) -> Any:
    """Import a module of a package; an ImportError if the package is not installed."""
    before = set(sys.modules)
    try:
        return import_module(name)
    except ImportError as error:
        if not _is_data(error.name):
            raise
    for half_imported in set(sys.modules) - before:
        if half_imported.partition(".")[0] == name.partition(".")[0]:
            del sys.modules[half_imported]
    with suppress(ImportError):
        import_module("transformers")  # which looks for torchvision once, and is not to find it
    finder = _StubFinder()
    sys.meta_path.insert(0, finder)
    try:
        return import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for stub in filter(_is_data, list(sys.modules)):
            del sys.modules[stub]
