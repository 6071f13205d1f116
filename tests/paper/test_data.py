"""Data that ships in packages: nothing of the test part is in the training part."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.paper.data import BLOCK, MOST_TEST, PATCH, PIXELS_A_CLASS, _patch, parts
from benchmarks.paper.other_grids import DIABETES, MNIST_TASKS, PINES


def test_mnist():
    train, test = parts("MNIST")
    assert (train.x.shape, test.x.shape) == ((4000, 28, 28, 1), (1000, 28, 28, 1))
    assert train.x.mean(dtype=np.float64) == pytest.approx(0, abs=1e-5)
    assert train.x.std(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    assert set(np.bincount(train.y)) == {400}
    both = np.concatenate([train.x, test.x]).reshape(5000, -1)
    assert len(np.unique(both.round(3), axis=0)) == 5000
    assert len(np.unique(MNIST_TASKS[1].draw(0).batches)) == 200


def test_no_pixel_of_indian_pines_is_in_both_parts():
    train, test = parts("Indian Pines")
    spectra = [{*map(bytes, part.x.reshape(-1, part.x.shape[-1]))} for part in (train, test)]
    outside = bytes(200 * 4)
    assert spectra[0] & spectra[1] == {outside}
    assert train.x.shape[1:] == (PATCH, PATCH, 200)
    assert np.bincount(train.y).min() >= PIXELS_A_CLASS <= np.bincount(test.y).min()
    assert np.bincount(test.y).max() == MOST_TEST
    assert len(np.bincount(train.y)) == len(PINES.classes)
    assert abs(train.x.mean()) < 0.5


def test_a_patch_is_cut_at_its_block():
    bands = np.arange(1, 1 + 4 * BLOCK**2, dtype=np.float32).reshape(2 * BLOCK, 2 * BLOCK, 1)
    middle = _patch(bands, 8, 24)[..., 0]
    np.testing.assert_array_equal(middle, bands[4:13, 20:29, 0])
    corner = _patch(bands, BLOCK - 1, BLOCK)[..., 0]  # the last row, and the first column
    np.testing.assert_array_equal(corner[:5, 4:], bands[BLOCK - 5 : BLOCK, BLOCK : BLOCK + 5, 0])
    assert not corner[5:].any()
    assert not corner[:, :4].any()


def test_a_regression_has_targets():
    train, test = DIABETES.train(), DIABETES.test()
    assert (len(train.x), len(test.x)) == (294, 148)
    assert train.y.std() == pytest.approx(1, abs=1e-5)
    draw = DIABETES.draw(3)
    np.testing.assert_array_equal(draw.labels, train.y)
    assert len(np.unique(draw.batches)) > 250
