"""Parts of errors that point to another framework: its adapter, or its package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# By the package of a class. Keras comes first: on torch, its layers are torch modules too.
_ADAPTERS = {
    "keras": "keras",
    "thinc": "thinc",
    "torch": "torch",
    **dict.fromkeys(("equinox", "flax", "haiku", "optax"), "optax"),
}


def name_kind(thing: object) -> str:
    """Name the class of an object with its module, unless that is builtins."""
    kind = thing if isinstance(thing, type) else type(thing)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return f"the class {name}" if kind is thing else name


def hint_at_adapter(thing: object, own: str = "") -> str:
    """Point to the adapter for an object of a framework, unless that is the adapter in use."""
    packages = {base.__module__.partition(".")[0] for base in type(thing).__mro__}
    library = next((name for name in _ADAPTERS if name in packages), "")
    adapter = _ADAPTERS.get(library, own)
    return "" if adapter == own else f"; for {library} use gcx.{adapter}"


def describe(thing: object, own: str = "") -> str:
    """Name the class of an object, and point to the adapter for it."""
    return name_kind(thing) + hint_at_adapter(thing, own)


@contextmanager
def needing(package: str, requirement: str) -> Iterator[None]:
    """Let the error for a package that is missing say how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name == package:
            error.msg += f"; pip install {requirement}"
        raise
