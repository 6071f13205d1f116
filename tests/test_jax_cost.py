"""What GC adds to an optimizer step on a CPU: counted, not timed. On a GPU: see xla_gpu.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gcx
import gcx.optax


def weights(*shapes: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(0)
    return {f"w{k}": jnp.asarray(rng.normal(size=s), "float32") for k, s in enumerate(shapes)}


@pytest.mark.parametrize("layouts", [{"w0": "...o", "w*": "ioo"}, lambda path, leaf: "...o"])
def test_compiles_once(layouts: Any) -> None:
    params = weights((6, 5), (4, 3, 2))
    optimizer = optax.chain(gcx.optax.centralize(layouts), optax.adamw(1e-3))
    state = optimizer.init(params)
    traced = []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traced.append(1)
        grads = jax.grad(lambda p: sum(jnp.sin(w).sum() for w in p.values()))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert len(traced) == 1


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_call_by_itself_compiles_once_for_a_shape_and_all_strengths(
    caplog: pytest.LogCaptureFixture, reproducible: bool
) -> None:
    def compilations(*shapes: tuple[int, ...], **options: float) -> int:
        caplog.clear()
        how: Any = {"reproducible": reproducible, **options}
        grads = [jnp.ones(shape) for shape in shapes]
        with jax.log_compiles():
            for grad in grads:
                for layout in ("o...", "oi", gcx.Layout("o...")):
                    gcx.centralize(grad, layout=layout, **how)
            gcx.centralize_many(grads, **how)
            gcx.optax.centralize({"*": "o..."}, **how).update(grads, None)
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    assert compilations((5, 19), (5, 19)) == 1  # shapes of no other test
    assert compilations((5, 19)) == 0
    assert compilations((5, 23)) == 1
    assert sum(compilations((5, 19), strength=part) for part in (0.25, 0.5, 0.75)) <= 1


@pytest.mark.parametrize("shape", [(256, 512), (64, 32, 3, 3)])
def test_no_more_work_than_the_peer(shape: tuple[int, ...]) -> None:
    """Where both take the same axes for the fan-in; as XLA counts memory accesses and additions.

    Since jax 0.11, a kernel of its own divides our sums: it reads them and writes the means.
    """
    params = weights(shape)
    ours = gcx.optax.centralize({"w0": "o..."})
    memory, additions = {}, {}
    for name, gc in (
        ("plain", optax.identity()),
        ("gcx", ours),
        ("peer", optax.centralize()),
        ("twice", optax.chain(ours, ours)),
    ):
        optimizer = optax.chain(gc, optax.adamw(1e-3))
        program = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).compile()
        counted = program.cost_analysis()
        memory[name], additions[name] = counted["bytes accessed"], counted["flops"]
    limit = memory["peer"] + 2 * 4 * shape[0]  # float32 sums, read; float32 means, written
    assert memory["plain"] < memory["gcx"] <= limit < memory["twice"]
    assert additions["plain"] < additions["gcx"] <= additions["peer"] < additions["twice"]


def test_only_a_program_keeps_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        jax.lax, "optimization_barrier", lambda mean: kept.append(mean.shape) or mean
    )
    grad = jnp.ones((3, 17))  # a shape of its own, as below, so that nothing is compiled already
    gcx.centralize(grad)
    assert kept == []
    jax.jit(gcx.centralize)(grad)
    params = {f"{name}/kernel": w for name, w in weights((6, 17), (4, 3, 17), (17,)).items()}
    jax.jit(gcx.optax.centralize("flax").update)(params, optax.EmptyState())
    assert kept == [(3, 1), (1, 17), (1, 1, 17)]
