"""The rows of the contract that a run asks for, and the facts that a row says it lacks."""

from __future__ import annotations

import pytest

from adapters import chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "adapter" in metafunc.fixturenames:
        rows = chosen(metafunc.config)
        metafunc.parametrize("adapter", rows, ids=[row.name for row in rows])


def pytest_itemcollected(item: pytest.Function) -> None:
    """Expect a test to fail of which the row says, by its name or case, that it lacks the fact."""
    if "adapter" in item.fixturenames:
        test, cases = item.originalname, item.callspec.id.split("-")
        names = {test, *cases, *(f"{test}[{case}]" for case in cases)}
        for name, reason in item.callspec.params["adapter"].lacks.items():
            if name in names or test.startswith(name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
