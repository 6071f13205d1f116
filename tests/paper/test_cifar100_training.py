"""Training on CIFAR-100: batches, network, schedule, and what Gradient Centralization does."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.paper.cells import BASE
from benchmarks.paper.cifar100.augmentation import DEVIATION, MEAN, batches, normalized, padded
from benchmarks.paper.cifar100.resnet import RESNET_50, ResNet
from benchmarks.paper.cifar100.settings import PAPER
from benchmarks.paper.cifar100.training import Training
from benchmarks.throughput.models import MODELS

from reference import fan_in_means
from small_cifar100 import CELL, CLASSES, CPU, SETTING, SMALL, TRAIN

ADAM = replace(CELL, optimizer="Adam", learning_rate=0.001)
BARE = replace(SETTING, arm=BASE, epochs=3)


def train(training: Training, epochs: int = 3) -> None:
    for number in range(1, epochs + 1):
        training.epoch(number, lambda: None)


# Batches


def test_each_image_of_a_batch_is_a_crop_of_the_right_one_and_comes_once():
    n = 20
    random = np.random.default_rng(0)
    images = random.integers(256, size=(n, 32, 32, 3), dtype=np.uint8)
    seen, crops = [], []
    generator = torch.Generator().manual_seed(0)
    for inputs, numbers in batches(padded(torch.from_numpy(images)), torch.arange(n), 8, generator):
        assert inputs.shape == (8, 3, 32, 32)
        assert inputs.is_contiguous(memory_format=torch.channels_last)
        seen += numbers.tolist()
        for image, number in zip(inputs, numbers, strict=True):
            found = _crops_that_match(image.numpy(), images[number])
            assert len(found) == 1
            crops += found
    assert len(seen) == len(set(seen)) == 16  # 4 are left, too few for a batch
    assert crops[:8] != crops[8:]  # each batch has its own
    tops, lefts, flips = zip(*crops, strict=True)
    assert len(set(tops)) > 4
    assert len(set(lefts)) > 4
    assert set(flips) == {False, True}


def _crops_that_match(given: np.ndarray, image: np.ndarray) -> list[tuple[int, int, bool]]:
    black = np.pad(image, ((4, 4), (4, 4), (0, 0))).astype(np.float64)
    large = ((black / 255 - MEAN) / DEVIATION).transpose(2, 0, 1)
    found = []
    for top, left, flip in product(range(9), range(9), (False, True)):
        crop = large[:, top : top + 32, left : left + 32]
        if np.allclose(given, crop[:, :, ::-1] if flip else crop, atol=1e-5):
            found.append((top, left, flip))
    return found


def test_normalization_is_that_of_the_authors():
    white, black = (torch.full((1, 32, 32, 3), value, dtype=torch.uint8) for value in (255, 0))
    expected = (1 - np.array([0.507, 0.487, 0.441])) / [0.267, 0.256, 0.276]
    np.testing.assert_allclose(normalized(white)[0, :, 0, 0], expected, rtol=1e-6)
    expected = -np.array([0.507, 0.487, 0.441]) / [0.267, 0.256, 0.276]
    np.testing.assert_allclose(normalized(black)[0, :, 9, 7], expected, rtol=1e-6)


def test_pairs_have_equal_weights_and_batches_also_after_training(data):
    without, centralized = (
        Training(replace(BARE, arm=arm), data, CPU) for arm in (BASE, "conv only")
    )
    start = without.model.state_dict()
    for name, value in centralized.model.state_dict().items():
        torch.testing.assert_close(value, start[name], rtol=0, atol=0)
    train(without, 1)
    train(centralized, 1)
    weights = (next(t.model.parameters()) for t in (without, centralized))
    assert not torch.equal(*weights)
    for ours, theirs in zip(without.batches(), centralized.batches(), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_seeds_differ_in_weights_and_batches(data):
    first, second = (Training(replace(BARE, seed=seed), data, CPU) for seed in (0, 1))
    assert not torch.equal(*(next(t.model.parameters()) for t in (first, second)))
    assert not torch.equal(*(next(t.batches())[0] for t in (first, second)))


def test_the_generator_of_the_caller_is_left_alone(data):
    before = torch.get_rng_state()
    train(Training(BARE, data, CPU), 1)
    assert torch.equal(torch.get_rng_state(), before)


# The network


def test_resnet_50_has_the_convolutions_of_the_paper():
    with torch.device("meta"):
        model = ResNet(RESNET_50, PAPER.width, 100)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    shapes = [tuple(m.weight.shape) for m in convolutions]
    assert shapes[0] == (64, 3, 3, 3)
    assert shapes[1:] == [weight.shape for weight in MODELS["resnet50"].weights[1:-1]]
    strides = [m.stride for m in convolutions if m.kernel_size == (3, 3)]
    assert [k for k, stride in enumerate(strides) if stride == (2, 2)] == [4, 8, 14]
    assert sum(p.numel() for p in model.parameters()) == 23_705_252


def test_images_are_reduced_by_8_before_the_mean():
    model = ResNet(RESNET_50, 1, 7)
    sizes = []
    pooling = next(m for m in model if isinstance(m, nn.AdaptiveAvgPool2d))
    pooling.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == [(2, 4 * 8, 4, 4)]


# Optimizers and schedule


def test_the_settings_are_those_of_the_paper(data):
    (sgd,) = Training(replace(BARE, epochs=200), data, CPU)._optimizer.param_groups
    asked = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False, "dampening": 0}
    assert asked.items() <= sgd.items()
    training = Training(replace(BARE, cell=ADAM), data, CPU)
    (adam,) = training._optimizer.param_groups
    asked = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 5e-4}
    assert asked.items() <= adam.items()
    assert isinstance(training._optimizer, torch.optim.Adam)
    assert not isinstance(training._optimizer, torch.optim.AdamW)


def test_the_learning_rate_falls_as_in_the_paper(data):
    assert Training(replace(BARE, epochs=200), data, CPU)._schedule.step_size == 60
    training = Training(replace(BARE, epochs=10), data, CPU)
    rates = [training.epoch(k + 1, lambda: None).learning_rate for k in range(10)]
    expected = [0.1] * 3 + [0.01] * 3 + [0.001] * 3 + [0.0001]
    assert rates == pytest.approx(expected)


# Corollary 4.1


@pytest.mark.parametrize(
    ("arm", "kinds"),
    [(BASE, ()), ("conv only", (nn.Conv2d,)), ("gradient", (nn.Conv2d, nn.Linear))],
)
def test_means_of_centralized_weights_stay_put_and_others_move(data, arm, kinds):
    training = Training(replace(BARE, arm=arm), data, CPU)
    layers = [m for m in training.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    start = [_means(layer) for layer in layers]
    train(training)
    for layer, before in zip(layers, start, strict=True):
        drift = np.abs(_means(layer) - before).max()
        assert drift < 1e-6 if isinstance(layer, kinds) else drift > 1e-4


def _means(layer: nn.Module) -> np.ndarray:
    weight = layer.weight.detach().numpy()
    return fan_in_means(weight, tuple(range(1, weight.ndim)))


# Mixed precision, whose place is a GPU, but which the CPU can compute too


def test_mixed_precision_keeps_weights_in_float32_and_their_means(data):
    setting = replace(BARE, arm="conv only", precision="bfloat16")
    mixed, full = (Training(s, data, CPU) for s in (setting, replace(setting, precision="float32")))
    dtypes = []
    stem = mixed.model[0]
    stem.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    layers = [m for m in mixed.model.modules() if isinstance(m, nn.Conv2d)]
    start = [_means(layer) for layer in layers]
    batch = next(full.batches())
    loss = full.step(*batch)[0]
    mixed_loss = mixed.step(*batch)[0]
    assert set(dtypes) == {torch.bfloat16}
    assert mixed_loss.dtype == torch.float32
    assert mixed_loss != loss
    torch.testing.assert_close(mixed_loss, loss, rtol=2e-2, atol=0)
    train(mixed)
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    for layer, before in zip(layers, start, strict=True):
        assert np.abs(_means(layer) - before).max() < 1e-6


# Scores


def test_scores_are_those_of_all_images(data):
    training = Training(BARE, data, CPU)
    train(training, 1)
    loss, accuracy = training.test()
    training.model.eval()
    with torch.no_grad():
        logits = training.model(normalized(data.test_images)).double()
    expected = nn.functional.cross_entropy(logits, data.test_labels).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == 100 * (logits.argmax(1) == data.test_labels).double().mean().item()


def test_the_network_learns(data):
    training = Training(replace(BARE, epochs=8), data, CPU)
    rows = [training.epoch(k + 1, lambda: None) for k in range(8)]
    assert rows[-1].training_loss < 0.8 * rows[0].training_loss
    assert rows[-1].training_accuracy > 100 / CLASSES


def test_tick_is_called_after_each_batch(data):
    ticks = []
    Training(BARE, data, CPU).epoch(1, lambda: ticks.append(None))
    assert len(ticks) == TRAIN // SMALL.batch
