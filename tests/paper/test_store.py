"""Outcomes in files: the same when they are read, and all or nothing when they are written."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper import store

from outcomes import TABLE_1, arms


def some(effect: float) -> list:
    return [*arms(TABLE_1[0], {"gradient": effect}), *arms(TABLE_1[1], {"update": 0.0}, seeds=3)]


def assert_same(found, expected):
    assert [(o.cell, o.arm, o.seeds) for o in found] == [(o.cell, o.arm, o.seeds) for o in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("accuracy", "loss", "checkpoints"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)


def test_what_was_saved_is_loaded(tmp_path):
    path = tmp_path / "new folder" / "some.npz"
    store.save(path, some(1.0), seconds=3.5, key="a key")
    found, about = store.load(path)
    assert_same(found, some(1.0))
    assert about == {"seconds": 3.5, "key": "a key"}
    assert [p.name for p in path.parent.iterdir()] == ["some.npz"]


@pytest.mark.parametrize("kept", [0, 2, 500])
def test_a_file_that_is_not_whole_is_named(tmp_path, kept):
    path = tmp_path / "some.npz"
    store.save(path, some(1.0))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CannotRunError, match=f"{path} cannot be read .*: delete it"):
        store.load(path)


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "some.npz"
    store.save(path, some(1.0))
    before = path.read_bytes()

    def cut_short(file, **arrays):
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", cut_short)
        with pytest.raises(KeyboardInterrupt):
            store.save(path, some(2.0))
    assert path.read_bytes() == before
    store.save(path, some(2.0))
    assert_same(store.load(path)[0], some(2.0))
