"""What a run shows of the theory, each number against one that is computed in another way."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from matplotlib import rc_context

from benchmarks.paper import theory, theory_plots
from benchmarks.paper.cells import BASE
from benchmarks.paper.curvature import spectral_norms
from benchmarks.paper.tasks import BATCH
from benchmarks.paper.theory import (
    BRIEF,
    GAMMAS,
    GC,
    Seen,
    hessian_product,
    kernels,
    response,
    see,
)

STEP = f"step (batches of {BATCH})"
PICTURES = {
    "drift": (STEP, "without GC", "with GC", "over all output units"),
    "gradient": (
        STEP,
        "before: ",
        "after: ",
        "norm over all centralized weights",
    ),
    "curvature": (STEP, "largest singular value (nats per squared weight)"),
    "shift": ("change of the output (nats)", "added to all inputs of the layer", "class "),
}


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    """Short runs; kept, as they take seconds to compile."""
    return see(BRIEF)


def test_norms_of_a_matrix_that_is_there() -> None:
    rng = np.random.default_rng(0)
    half = rng.standard_normal((12, 12))
    matrix = half + half.T - 9 * np.eye(12)  # its largest eigenvalue is negative
    projection = np.kron(np.eye(3), np.eye(4) - np.full((4, 4), 1 / 4))
    found = spectral_norms(lambda v: matrix @ v, lambda v: projection @ v, 12)
    expected = [
        np.linalg.norm(product, 2)
        for product in (matrix, projection @ matrix, projection @ matrix @ projection)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert expected[0] > expected[1] > expected[2]


def test_the_product_with_the_hessian_is_the_slope_of_the_gradient() -> None:
    draw = BRIEF.task.draw(theory.SEED)
    images = draw.batches[0]
    with jax.enable_x64(True):
        weights = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), BRIEF.network.start(theory.SEED)[0]
        )
        flat, unravel = ravel_pytree(kernels(weights))

        @jax.jit
        @jax.grad
        def gradient(flat: jax.Array) -> jax.Array:
            moved = theory.with_kernels(weights, unravel(flat))
            return theory._loss(BRIEF, draw, images, moved)

        direction = jnp.asarray(np.random.default_rng(1).standard_normal(flat.size))
        h = 1e-8  # so small that no ReLU turns within it
        slope = (gradient(flat + h * direction) - gradient(flat - h * direction)) / (2 * h)
        product = hessian_product(BRIEF, draw, images, weights, direction)
        assert product.dtype == jnp.float64
        np.testing.assert_allclose(product, slope, atol=1e-5 * float(jnp.abs(slope).max()))


def test_corollary_4_1_the_sums_stay_with_gc_alone(seen: dict[str, Seen]) -> None:
    assert seen[GC].drift[0] == seen[BASE].drift[0] == 0
    assert seen[GC].drift.max() < 1e-5
    assert seen[BASE].drift[-1] > 1e-2


def test_corollary_4_1_the_answer_to_a_shift_is_that_of_the_start(seen: dict[str, Seen]) -> None:
    for arm, is_that_of_the_start in ((GC, True), (BASE, False)):
        features, (start, end) = seen[arm].features, seen[arm].heads
        answer = response(features, end)
        np.testing.assert_allclose(answer, GAMMAS[:, None] * end.sum(axis=0), atol=1e-12)
        of_start = GAMMAS[:, None] * start.sum(axis=0)
        assert (np.abs(answer - of_start).max() < 1e-5) == is_that_of_the_start


@pytest.mark.parametrize("arm", [BASE, GC])
def test_proposition_4_2_along_a_run(arm: str, seen: dict[str, Seen]) -> None:
    run = seen[arm]
    assert len(run.gradient) == BRIEF.task.steps
    np.testing.assert_allclose(run.gradient**2, run.kept**2 + run.removed**2, rtol=1e-5)
    assert run.removed.min() > 0
    assert len(run.points) == len(run.curvature) == BRIEF.points
    for norms in run.curvature:
        assert norms.hessian > norms.of_gradient > norms.in_hyperplane > 0


def test_pictures_that_can_be_read_and_are_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: dict[str, Seen]
) -> None:
    monkeypatch.setattr(theory_plots, "see", lambda _: seen)
    with rc_context({"svg.fonttype": "none"}):
        paths = theory_plots.draw(tmp_path / "words", BRIEF)
        again = theory_plots.draw(tmp_path / "again", BRIEF)
    assert [path.name for path in paths] == [f"theory-{name}.svg" for name in PICTURES]
    for path, other, words in zip(paths, again, PICTURES.values(), strict=True):
        text = path.read_text(encoding="utf-8")
        trained = ("digits, 4 images a class, group norm, SGDM,", "learning rate 0.05")
        for each in (*trained, *words):
            assert each in text
        assert path.read_bytes() == other.read_bytes()
