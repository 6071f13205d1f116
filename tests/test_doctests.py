"""The examples in docstrings run, in every module whose framework is installed."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import gcx

PACKAGE = Path(gcx.__file__).parent
WITH_EXAMPLES = sorted(
    path.relative_to(PACKAGE.parent)
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
OPTIONAL = {"jax", "keras", "optax", "pytorch_lightning", "thinc", "torch", "transformers"}


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=str)
def test_examples_run(path: Path) -> None:
    name = ".".join(path.with_suffix("").parts)
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in OPTIONAL:
            pytest.skip(f"needs {error.name}")
        raise
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
