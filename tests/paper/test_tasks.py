"""The tasks on digits: what a seed draws, and that nothing of the test part is in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks.paper.tasks import ALL, BATCH, FEW, Task

HALF = Task("5 to 9", images_a_class=20, classes=(5, 6, 7, 8, 9))
TASKS = (ALL, FEW, HALF)


def labelled(task: Task, seed: int = 0) -> np.ndarray:
    """The images of a long training: each of them comes sooner or later."""
    return np.unique(replace(task, steps=600).draw(seed).batches)


def test_every_image_is_in_one_part():
    train, test = ALL.train(), ALL.test()
    assert (len(train.x), len(test.x)) == (1198, 599)
    raw = load_digits().data.astype(np.float32)
    assert len(np.unique(raw, axis=0)) == len(raw)  # so that equal images are one image
    parts = np.concatenate([train.x, test.x]).reshape(-1, 64)
    assert len(np.unique(parts.round(4), axis=0)) == len(raw)
    for y in (train.y, test.y):
        shares = np.bincount(y) / len(y)
        assert shares.max() - shares.min() < 0.01


def test_pixels_are_scaled_by_the_training_part_alone():
    train, test = ALL.train().x, ALL.test().x
    assert train.shape[1:] == test.shape[1:] == (8, 8, 1)
    assert abs(train.mean(dtype=np.float64)) < 1e-6
    assert train.std(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert abs(test.mean(dtype=np.float64)) > 1e-4


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_seed_draws_the_same_again_and_another_seed_something_else(task):
    for first, second in zip(task.draw(3), task.draw(3), strict=True):
        np.testing.assert_array_equal(first, second)
    assert (task.draw(3).batches != task.draw(4).batches).any()


@pytest.mark.parametrize("task", [FEW, HALF], ids=lambda task: task.name)
def test_so_many_images_a_class_are_labelled(task):
    y = task.train().y
    found = labelled(task)
    assert dict(zip(*np.unique(y[found], return_counts=True), strict=True)) == dict.fromkeys(
        task.classes, 20
    )
    assert (labelled(task, 1) != found).any()


def test_more_images_a_class_are_those_of_fewer_and_others():
    assert set(labelled(replace(FEW, images_a_class=10))) < set(labelled(FEW)) < set(labelled(ALL))


def test_the_test_part_is_that_of_the_classes():
    assert set(HALF.test().y) == set(HALF.classes)
    assert len(HALF.test().y) == np.isin(ALL.test().y, HALF.classes).sum()


@pytest.mark.parametrize(
    ("task", "batches"), [(ALL, 1198 // BATCH), (FEW, 200 // BATCH), (HALF, 100 // BATCH)]
)
def test_an_epoch_has_each_image_once_at_most_and_drops_what_does_not_fill_a_batch(task, batches):
    drawn = replace(task, steps=2 * batches + 1).draw(0).batches
    assert drawn.shape == (2 * batches + 1, BATCH)
    first, second = drawn[:batches].ravel(), drawn[batches:-1].ravel()
    for epoch in (first, second):
        assert len(np.unique(epoch)) == len(epoch)
    assert (first != second).any()


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_a_part_of_the_labels_is_drawn_anew(noise):
    task, right = replace(ALL, noise=noise), ALL.train().y
    share = np.mean([(task.draw(seed).labels != right).mean() for seed in range(20)])
    assert share == pytest.approx(0.9 * noise, abs=0.01)  # a tenth are right by chance
    np.testing.assert_array_equal(task.draw(0).batches, ALL.draw(0).batches)


def test_noise_stays_in_the_classes_of_the_task():
    task = replace(HALF, noise=1.0)
    assert set(task.draw(0).labels) == set(HALF.classes)
    assert (replace(HALF, noise=0.0).draw(0).labels == HALF.train().y).all()
