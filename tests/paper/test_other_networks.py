"""The other networks against those of torch, and the scores of a regression."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.paper.other_grids import DIABETES
from benchmarks.paper.other_networks import Perceptron, Recurrent, Transformer
from benchmarks.paper.training import Grid, outcomes

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def start(network):
    """Weights none of whose biases is 0, as torch's tensors too."""
    weights, _ = network.start(0)
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda w: w + rng.normal(0, 0.1, w.shape).astype(np.float32), weights)
    return noisy, jax.tree.map(torch.tensor, noisy)


def images(n=3):
    return np.random.default_rng(0).standard_normal((n, 28, 28, 1)).astype(np.float32)


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def test_the_gru():
    network = Recurrent(width=6)
    weights, of_torch = start(network)
    gru = torch.nn.GRU(28, 6, batch_first=True)
    for name, layer in (("ih", of_torch["input"]), ("hh", of_torch["recurrent"])):
        getattr(gru, f"weight_{name}_l0").data = layer["kernel"].T
        getattr(gru, f"bias_{name}_l0").data = layer["bias"]
    with torch.no_grad():
        state = gru(torch.tensor(images()[..., 0]))[1][0]
        expected = dense(of_torch["head"], state)
    found, _ = network(weights, {}, images(), training=True)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_the_transformer():
    network = Transformer(width=8, heads=2, blocks=1)
    weights, of_torch = start(network)
    block = of_torch["block0"]

    def normed(layer, x):
        return functional.layer_norm(x, (8,), layer["scale"], layer["bias"])

    def heads(x):
        return x.reshape(3, 16, 2, 4).transpose(1, 2)

    patches = functional.unfold(torch.tensor(images()).permute(0, 3, 1, 2), 7, stride=7)
    x = dense(of_torch["embed"], patches.transpose(1, 2)) + of_torch["position"]
    y = normed(block["norm1"], x)
    parts = [heads(dense(block[name], y)) for name in ("query", "key", "value")]
    mixed = functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(3, 16, 8)
    x = x + dense(block["out"], mixed)
    inner = functional.gelu(dense(block["up"], normed(block["norm2"], x)), approximate="tanh")
    x = x + dense(block["down"], inner)
    expected = dense(of_torch["head"], normed(of_torch["norm"], x).mean(1))
    found, _ = network(weights, {}, images(), training=True)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_a_regression_is_scored_by_the_variance_it_explains():
    task = replace(DIABETES, steps=60, checkpoints=2)
    grid = Grid(task, Perceptron(), "Adam", ((0.01, 0.0), (1e-9, 0.0)))
    learned, _, still, _ = outcomes([grid], [0, 1])
    assert (learned.accuracy[:, -1] > 20).all()
    assert (learned.accuracy[:, -1] <= 100).all()
    np.testing.assert_allclose(still.accuracy[:, 0], still.accuracy[:, 1], atol=1e-3)
    assert (still.loss.mean() > learned.loss.mean()).all()
    y = task.test().y
    weights, _ = Perceptron().start(0)
    outputs, _ = Perceptron()(weights, {}, task.test().x, training=False)
    expected = 100 * (1 - np.square(outputs[:, 0] - y).sum() / np.square(y - y.mean()).sum())
    assert still.accuracy[0, -1] == pytest.approx(float(max(expected, -100)), abs=0.1)


@pytest.mark.parametrize("network", [Transformer(), Recurrent(), Perceptron()], ids=str)
def test_a_start_is_that_of_its_seed(network):
    first, again, other = (network.start(seed)[0] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [
        [leaf for leaf in jax.tree.leaves(weights) if leaf.ndim == 2] for weights in (first, other)
    ]
    assert all((one != another).all() for one, another in zip(*kernels, strict=True))
