"""The network in JAX, against the functions of torch and the module made of those."""

from __future__ import annotations

from itertools import product

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.paper import network
from benchmarks.paper.network import EPSILON, GROUPS, RUNNING, Network
from benchmarks.paper.on_torch import ResidualNetwork

from short_runs import NORMS

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def images(channels: int = 8) -> np.ndarray:
    random = np.random.default_rng(0)
    return (1 + 3 * random.standard_normal((5, 8, 8, channels))).astype(np.float32)


def of_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def inside(x: np.ndarray | torch.Tensor) -> np.ndarray:
    """As the network has them between its layers: (channels, height, width, n)."""
    return np.asarray(x).transpose((1, 2, 3, 0) if isinstance(x, torch.Tensor) else (3, 1, 2, 0))


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_convolution(size, stride):
    x = images()
    kernel = np.random.default_rng(1).standard_normal((size, size, 8, 6)).astype(np.float32)
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1))
    expected = functional.conv2d(of_torch(x), weight, stride=stride, padding=size // 2)
    found = network._convolve(kernel, inside(x), stride)
    np.testing.assert_allclose(found, inside(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_and_its_running_statistics(training):
    x = images()
    mean, variance = np.full(8, 0.5, np.float32), np.full(8, 4, np.float32)
    running = torch.tensor(mean), torch.tensor(variance)
    expected = functional.batch_norm(
        of_torch(x), *running, training=training, momentum=RUNNING, eps=EPSILON
    )
    found, after = network._batch_norm(inside(x), (mean, variance), training=training)
    np.testing.assert_allclose(found, inside(expected), **TOLERANCE)
    for value, of_torch_ in zip(after, running, strict=True):
        np.testing.assert_allclose(value, of_torch_, **TOLERANCE)
    assert (after[0] == mean).all() != training


def test_group_norm():
    expected = functional.group_norm(of_torch(images()), GROUPS, eps=EPSILON)
    np.testing.assert_allclose(network._group_norm(inside(images())), inside(expected), **TOLERANCE)


@pytest.mark.parametrize(
    ("norm", "blocks", "training"), [*product(NORMS, [1], [True, False]), ("batch norm", 2, True)]
)
def test_the_whole_network(norm, blocks, training):
    of = Network(norm, blocks=blocks, width=8)
    names = list(of.start(0)[1])  # in the order of the layers
    weights, statistics = jax.tree.map(_shaken, of.start(0))
    x = images(1)
    module = ResidualNetwork(of, weights).train(training)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer, name in zip(norms, names, strict=True):
        layer.running_mean, layer.running_var = map(torch.tensor, statistics[name])
    logits, after = of(weights, statistics, x, training=training)
    with torch.no_grad():
        expected = module(of_torch(x))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    for layer, name in zip(norms, names, strict=True):
        np.testing.assert_allclose(after[name][0], layer.running_mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(after[name][1], layer.running_var, rtol=1e-4)


def _shaken(values: np.ndarray) -> np.ndarray:
    """No scale that is 1, no bias that is 0; variances stay positive."""
    noise = np.random.default_rng(values.size).uniform(0.1, 0.5, values.shape)
    return (values + noise).astype(np.float32)


def test_a_start_is_that_of_its_seed():
    first, again, other = (Network("batch norm").start(seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first[0]["stem"]["kernel"] != other[0]["stem"]["kernel"]).any()
    jax.tree.map(np.testing.assert_array_equal, first[0], Network("no norm").start(0)[0])


def test_a_start_is_he_normal():
    weights, _ = Network("no norm", width=64).start(0)
    kernel = weights["stage1_block0"]["second"]["kernel"]
    assert kernel.shape == (3, 3, 128, 128)
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.01)
    assert abs(kernel.mean()) < 1e-3
