"""NumPy: the gradients by hand, and `gcx.optim.SGD`."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.demo.problem import Problem
from benchmarks.demo.training import LEARNING_RATE, MOMENTUM
from gcx.optim import SGD

__all__ = ["NETWORKS", "trainer"]

NETWORKS = ("mlp",)


def trainer(problem: Problem, *, centralize: bool) -> Mlp:
    """See `benchmarks.demo.training.Framework`."""
    optimizer = SGD(
        LEARNING_RATE,
        momentum=MOMENTUM,
        where="gradient" if centralize else None,
        layouts="...o",  # kernels are (in, out)
    )
    return Mlp(problem.weights, optimizer)


class Mlp:
    """Two dense layers with a rectifier between them, and cross-entropy."""

    def __init__(self, weights: dict[str, dict[str, Any]], optimizer: SGD) -> None:
        self._weights = weights
        self._optimizer = optimizer
        self._state = optimizer.init(weights)

    def step(self, images: Any, labels: Any, /) -> float:
        """See `benchmarks.demo.training.Trainer`."""
        inputs, hidden, logits = self._forward(images)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_likelihoods = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        of_labels = np.arange(len(labels)), labels
        loss = -log_likelihoods[of_labels].mean()

        to_logits = np.exp(log_likelihoods)
        to_logits[of_labels] -= 1
        to_logits /= len(labels)
        to_hidden = (to_logits @ self._weights["output"]["kernel"].T) * (hidden > 0)
        grads = {
            "hidden": {"kernel": inputs.T @ to_hidden, "bias": to_hidden.sum(axis=0)},
            "output": {"kernel": hidden.T @ to_logits, "bias": to_logits.sum(axis=0)},
        }
        self._weights, self._state = self._optimizer.update(self._weights, grads, self._state)
        return float(loss)

    def predict(self, images: Any, /) -> Any:
        """See `benchmarks.demo.training.Trainer`."""
        return self._forward(images)[-1].argmax(axis=1)

    def kernels(self) -> list[Any]:
        """See `benchmarks.demo.training.Trainer`."""
        return [layer["kernel"] for layer in self._weights.values()]

    def _forward(self, images: Any) -> tuple[Any, Any, Any]:
        hidden_layer, output_layer = self._weights["hidden"], self._weights["output"]
        inputs = images.reshape(len(images), -1)
        hidden = np.maximum(inputs @ hidden_layer["kernel"] + hidden_layer["bias"], 0)
        return inputs, hidden, hidden @ output_layer["kernel"] + output_layer["bias"]
