"""Which session of noxfile.py runs an example: the first that has all that the example imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

# By what follows `--examples=` in noxfile.py.
SESSIONS = {
    "agreement": {
        *("numpy", "torch", "jax", "optax", "flax", "haiku", "equinox", "sklearn"),
        "pytorch_optimizer",
    },
    "torch": {"numpy", "torch", "lightning", "transformers", "accelerate"},
    "keras": {"numpy", "torch", "jax", "optax", "keras"},
    "thinc": {"numpy", "thinc", "spacy", "mlx", "sklearn"},
    "cupy": {"numpy", "cupy"},
}
_PACKAGES = set().union(*SESSIONS.values())


def session_of(code: str) -> str:
    """Find the session for some code; a ValueError if there is none."""
    needed = imported(code) & _PACKAGES
    for name, packages in SESSIONS.items():
        if needed <= packages:
            return name
    raise ValueError(f"no session has all of {sorted(needed)}")


def imported(code: str) -> set[str]:
    """Parts of the names of all that the code imports."""
    return {part for name in _imported_names(code) for part in name.split(".")}


def is_chosen(config: pytest.Config, code: str) -> bool:
    """Whether this run is for such code; one that was not asked for a session runs what it can."""
    session, asked = session_of(code), config.getoption("--examples")
    return session == asked if asked else all(map(find_spec, imported(code) & _PACKAGES))


def _imported_names(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
