"""A jitted train step with GC beside one without: ``python -m benchmarks jax-step``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.throughput.timing import interleaved, machine, use_one_core

WIDTHS = (256, 1024, 1024, 256)
BATCH = 64


class Row(NamedTuple):
    """Seconds a step."""

    layout: str
    optimizer: str
    plain: float
    gcx: float
    peer: float


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks jax-step", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for each row (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    use_one_core()  # before JAX is imported
    for line in report(options.seconds):
        print(line, flush=True)
    return 0


def report(seconds: float) -> Iterator[str]:
    """Lines of a table in Markdown."""
    import jax
    import optax

    yield f"{machine()}, one core; jax {jax.__version__}, optax {optax.__version__}, float32."
    yield f"Perceptron of widths {'-'.join(map(str, WIDTHS))}, batch {BATCH}."
    yield "Below 1 the step with gcx is faster."
    yield ""
    yield "| kernels | optimizer | without GC | gcx over that | gcx over optax.centralize |"
    yield "|---|---|---|---|---|"
    for row in rows(seconds):
        yield (
            f"| {row.layout} | {row.optimizer} | {1e3 * row.plain:.2f} ms "
            f"| {row.gcx / row.plain:.3f} | {row.gcx / row.peer:.3f} |"
        )


def rows(seconds: float) -> Iterator[Row]:
    import optax

    import gcx.optax

    optimizers = {"sgd, momentum": optax.sgd(1e-2, momentum=0.9), "adamw": optax.adamw(1e-3)}
    for layout in ("...o", "o..."):
        for name, optimizer in optimizers.items():
            places = {
                "plain": optax.identity(),
                "gcx": gcx.optax.centralize({"*": layout}),
                "peer": optax.centralize(),
            }
            candidates = {
                place: training(optax.chain(gc, optimizer), layout) for place, gc in places.items()
            }
            times = interleaved(candidates, seconds=seconds, repeats=3)
            yield Row(layout, name, **times)


def training(optimizer: Any, layout: str) -> Callable[[], object]:
    """Take the next step, in memory that the step before gave back."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    rng = np.random.default_rng(0)
    is_output_first = layout == "o..."
    params = {
        f"w{k}": jnp.asarray(rng.normal(size=(n, m) if is_output_first else (m, n)), "float32") / 32
        for k, (m, n) in enumerate(pairwise(WIDTHS))
    }
    x = jnp.asarray(rng.normal(size=(BATCH, WIDTHS[0])), "float32")

    def loss(params: Any) -> Any:
        hidden = x
        for weight in params.values():
            hidden = jnp.tanh(hidden @ (weight.T if is_output_first else weight))
        return ((hidden - x) ** 2).mean()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    now = [params, optimizer.init(params)]

    def take() -> None:
        now[:] = step(*now)
        now[0]["w0"].block_until_ready()

    return take
