"""A study in processes: what is there is not run again, and what is asked for is run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.paper.grids import Study
from benchmarks.paper.network import Network
from benchmarks.paper.study import is_done, results, run
from benchmarks.paper.training import Grid

from short_runs import TASK

GRID = Grid(TASK, Network("no norm", blocks=0, width=4), "SGDM", ((0.05, 0.0),))
JAX = Study("in jax", "", ((GRID,),), seeds=2)
TORCH = Study("in torch", "", ((GRID,),), seeds=2, library="torch")


def contents(folder):
    """Of each file: the time that a run took is in it, so that it tells one run from another."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_what_is_missing_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # what takes long is to compile
    run([JAX, TORCH], tmp_path)
    before = contents(tmp_path)
    assert ["-jax-" in name or "-torch-" in name for name in before] == [True, True]
    in_jax, in_torch = results(JAX, tmp_path), results(TORCH, tmp_path)
    assert min(in_jax.seconds, in_torch.seconds) > 0
    expected = {outcome.arm: outcome for outcome in in_torch.outcomes}
    assert {outcome.arm for outcome in in_jax.outcomes} == {"without", "gradient"}
    for outcome in in_jax.outcomes:
        assert outcome.seeds == (0, 1)
        np.testing.assert_allclose(outcome.loss, expected[outcome.arm].loss, rtol=2e-5)

    run([JAX, TORCH], tmp_path)
    assert contents(tmp_path) == before

    assert is_done(JAX, tmp_path)
    assert not is_done(JAX, tmp_path, seeds=3)
    assert in_jax.machines == in_torch.machines != []

    question = replace(JAX, programs=((replace(GRID, arms=("without", "update")),),))
    assert not is_done(question, tmp_path)
