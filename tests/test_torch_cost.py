"""Python calls in a step: few, and none for each weight."""

from __future__ import annotations

import pytest

from benchmarks.frames import frames_of_a_step


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_step_calls_few_functions_in_few_files(options: dict[str, float]) -> None:
    found = frames_of_a_step(**options)
    assert len(found.calls) <= 30
    assert len(found.files) <= 6
    assert frames_of_a_step(layers=40, **options) == found
