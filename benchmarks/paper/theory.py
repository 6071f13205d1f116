"""What the paper proves, measured along one run with Gradient Centralization, and one without.

Group norm treats each image on its own, so that the loss of all labelled images is the mean of
those of the batches, and its Hessian that of the training loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import gcx
from benchmarks.paper.cells import BASE, Cell
from benchmarks.paper.curvature import Norms, spectral_norms
from benchmarks.paper.grids import CALM_RATE, DECAY
from benchmarks.paper.network import Network, Weights
from benchmarks.paper.tasks import FEW, Draw, Task
from benchmarks.paper.training import optimizer

__all__ = ["BRIEF", "GAMMAS", "GC", "WHOLE", "Experiment", "Seen", "response", "see"]

GC = "gradient"
LAYOUT = "...o"

SEED = 0
GAMMAS = np.linspace(-1, 1, 9)


@dataclass(frozen=True)
class Experiment:
    """SGD with momentum and coupled weight decay, which P centralizes, too."""

    task: Task
    network: Network
    points: int  # of the run, at which the Hessian is looked at

    @property
    def cell(self) -> Cell:
        """How it is trained."""
        return Cell(self.task.name, self.network.name, "SGDM", CALM_RATE, DECAY)


WHOLE = Experiment(FEW, Network("group norm"), points=10)
FEWER = replace(FEW, name="digits, 4 images a class", images_a_class=4, steps=12)
BRIEF = Experiment(FEWER, Network("group norm", width=4), points=2)


@dataclass(frozen=True)
class Seen:
    """What a run shows. All weights that GC centralizes are taken together, as one vector.

    Attributes
    ----------
    drift : array, shape (steps + 1,)
        Norm of ``1^T (w_t - w_0)`` over all output units, before each step and after the last.
    gradient, kept, removed : array, shape (steps,)
        Norms of the gradient g of each batch, of P g, and of g - P g.
    points : array, shape (points,)
        Steps done when the Hessian was looked at.
    curvature : list of Norms
        There, of the Hessian of the mean loss of all labelled images.
    features : array, shape (test images, fan-in)
        Inputs of the dense head after training.
    heads : array, shape (2, fan-in, classes)
        Weights of the head at the start, and after training.
    """

    drift: Any
    gradient: Any
    kept: Any
    removed: Any
    points: Any
    curvature: list[Norms]
    features: Any
    heads: Any


def see(experiment: Experiment = WHOLE) -> dict[str, Seen]:
    """Train without GC and with it, in one program, and measure."""
    draw = experiment.task.draw(SEED)
    arms = (BASE, GC)
    runs = jax.jit(lambda draw: [_train(experiment, arm, draw) for arm in arms])(draw)
    return {arm: _measure(experiment, draw, *run) for arm, run in zip(arms, runs, strict=True)}


def _measure(experiment: Experiment, draw: Draw, path: Weights, norms: dict[str, Any]) -> Seen:
    task, network = experiment.task, experiment.network
    labelled = np.unique(draw.batches)
    steps = np.unique(np.linspace(0, task.steps, experiment.points).round().astype(int))
    head = path["head"]["kernel"]
    return Seen(
        drift=_drift(path),
        **{name: np.asarray(values) for name, values in norms.items()},
        points=steps,
        curvature=[curvature(experiment, draw, labelled, _at(path, step)) for step in steps],
        features=_features(network, _at(path, -1), task.test().x),
        heads=np.asarray(head[jnp.array([0, -1])], np.float64),
    )


def kernels(weights: Weights) -> list[Any]:
    """All weights that GC centralizes: those of every convolution, and of the head."""
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return [leaf for path, leaf in leaves if _is_kernel(path)]


def with_kernels(weights: Weights, replacing: list[Any]) -> Weights:
    """Put other kernels, in the order of `kernels`, in the place of those in the weights."""
    following = iter(replacing)
    return jax.tree_util.tree_map_with_path(  # type: ignore[no-any-return]
        lambda path, leaf: next(following) if _is_kernel(path) else leaf, weights
    )


def centralized(kernels: list[Any]) -> list[Any]:
    """Apply P to each output unit."""
    return [gcx.centralize(kernel, layout=LAYOUT) for kernel in kernels]


def curvature(experiment: Experiment, draw: Draw, images: Any, weights: Weights) -> Norms:
    """Norms of the Hessian of the mean loss of some images, with regard to the kernels alone."""

    def hessian(vector: Any) -> Any:
        single = jnp.asarray(vector, jnp.float32)
        return hessian_product(experiment, draw, images, weights, single)

    def projection(vector: Any) -> Any:
        return _projected(weights, jnp.asarray(vector, jnp.float32))

    return spectral_norms(hessian, projection, sum(kernel.size for kernel in kernels(weights)))


@partial(jax.jit, static_argnums=0)
def hessian_product(
    experiment: Experiment, draw: Draw, images: Any, weights: Weights, vector: Any
) -> Any:
    """Differentiate the gradient with regard to the kernels along the vector."""
    flat, unravel = ravel_pytree(kernels(weights))

    def loss(flat: Any) -> Any:
        return _loss(experiment, draw, images, with_kernels(weights, unravel(flat)))

    return jax.jvp(jax.grad(loss), (flat,), (vector,))[1]


@jax.jit
def _projected(weights: Weights, vector: Any) -> Any:
    """Apply P to a vector of all kernels."""
    _, unravel = ravel_pytree(kernels(weights))
    return ravel_pytree(centralized(unravel(vector)))[0]


def response(features: Any, weights: Any) -> Any:
    """Return the mean of ``w^T (x + gamma 1) - w^T x`` over the features x: (gammas, classes)."""
    shifted = features + GAMMAS[:, None, None]
    return (shifted @ weights - features @ weights).mean(axis=1)


def _is_kernel(path: Any) -> bool:
    return bool(path[-1].key == "kernel")


def _at(path: Weights, step: int) -> Weights:
    return jax.tree.map(lambda leaf: leaf[step], path)  # type: ignore[no-any-return]


def _train(experiment: Experiment, arm: str, draw: Draw) -> tuple[Weights, dict[str, Any]]:
    """Return the weights before each step and after the last, and the norms of `Seen`."""
    cell, steps = experiment.cell, experiment.task.steps
    rule = optimizer(cell.optimizer, arm, cell.learning_rate, cell.weight_decay, steps)

    def step(carry: Any, batch: Any) -> Any:
        weights, state = carry
        grads = jax.grad(partial(_loss, experiment, draw, batch))(weights)
        updates, state = rule.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), (weights, _norms(kernels(grads)))

    start, _ = experiment.network.start(SEED)
    (end, _), (path, norms) = jax.lax.scan(step, (start, rule.init(start)), draw.batches)
    path = jax.tree.map(lambda before, last: jnp.append(before, last[None], 0), path, end)
    return path, norms


def _loss(experiment: Experiment, draw: Draw, batch: Any, weights: Weights) -> Any:
    images, labels = jnp.asarray(experiment.task.train().x), jnp.asarray(draw.labels)
    logits, _ = experiment.network(weights, {}, images[batch], training=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()


def _norms(grads: list[Any]) -> dict[str, Any]:
    kept = centralized(grads)
    removed = [grad - rest for grad, rest in zip(grads, kept, strict=True)]
    named = {"gradient": grads, "kept": kept, "removed": removed}
    return {name: jnp.linalg.norm(ravel_pytree(arrays)[0]) for name, arrays in named.items()}


def _drift(path: Weights) -> Any:
    sums = [
        np.asarray(kernel, np.float64).sum(axis=tuple(range(1, kernel.ndim - 1)))
        for kernel in kernels(path)
    ]
    together = np.concatenate(sums, axis=1)
    return np.linalg.norm(together - together[0], axis=1)


def _features(network: Network, weights: Weights, x: Any) -> Any:
    """Return what the network gives where its head is the identity: the inputs of the head."""
    fan_in = len(weights["head"]["kernel"])
    identity = {"kernel": np.eye(fan_in, dtype=np.float32), "bias": np.float32(0)}
    apply = jax.jit(partial(network, training=False))  # one program in place of many
    features, _ = apply({**weights, "head": identity}, {}, x)
    return np.asarray(features, np.float64)
