"""Program: GC of gradients in parts, in shard_map, pmap, train steps and by explicit sharding.

On eight devices, for which a CPU stands.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gcx
import gcx.optax
from gcx import Layout

from reference import centralized

Facts = dict[str, Any]

COLLECTIVE = re.compile(
    r"= (\S+|\(.*?\)) "
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def mesh(x: int = 4, y: int = 2, kind: AxisType = AxisType.Auto) -> Any:
    """All eight devices in two axes; with two processes, ``x`` leads from one to the other."""
    return jax.make_mesh((x, y), ("x", "y"), (kind, kind))


def sharded(devices: Any, spec: P, shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """Random numbers, the same in all processes, each of which makes its own part."""
    numbers = np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))
    sharding = NamedSharding(devices, spec)
    return jax.make_array_from_callback(shape, sharding, lambda index: numbers[index])


def whole(devices: Any, tree: Any) -> Any:
    """The numbers of all devices, in float64."""
    if jax.process_count() > 1:  # of which each has a part
        everywhere = NamedSharding(devices, P())
        tree = jax.jit(lambda arrays: arrays, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda array: np.asarray(array).astype("float64"), tree)


def collectives(compiled: Any) -> Counter[str]:
    """What a program communicates: kinds and numbers of elements."""
    found: Counter[str] = Counter()
    for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
        for shape in re.findall(r"\[([\d,]*)\]", shapes):
            found[f"{kind} {np.prod([int(n) for n in shape.split(',') if n], dtype=int)}"] += 1
    return found


Function = Callable[[Any], Any]

SHAPE = (16, 24)


def gc(axis_name: Any = None) -> Function:
    """GC of one gradient, a Flax kernel, by the transformation of optax."""
    optimizer = gcx.optax.centralize("flax", axis_name=axis_name)

    def update(grad: Any) -> Any:
        updates, _ = optimizer.update({"dense": {"kernel": grad}}, optax.EmptyState())
        return updates["dense"]["kernel"]

    return update


def in_shard_map(
    spec: P,
    function: Function,
    *,
    shape: tuple[int, int] = SHAPE,
    dtype: str = "float32",
    x: int = 4,
    y: int = 2,
    **options: Any,
) -> Facts:
    devices = mesh(x, y)
    mapped = jax.shard_map(function, mesh=devices, in_specs=spec, out_specs=spec, **options)
    return facts(devices, mapped, sharded(devices, spec, shape, dtype))


def by_itself(spec: P, layout: str = "...o", kind: AxisType = AxisType.Auto) -> Facts:
    """Call gcx.centralize on a whole array, whose parts are on all devices."""
    devices = mesh(kind=kind)
    function, axes = partial(gcx.centralize, layout=layout), Layout(layout).fan_in_axes(2)
    return facts(devices, function, sharded(devices, spec, SHAPE), axes)


explicit = partial(by_itself, kind=AxisType.Explicit)


def rows_and_columns() -> Any:
    return np.random.default_rng(0).normal(size=SHAPE).astype("float32")


def facts(devices: Any, function: Function, grad: Any, axes: tuple[int, ...] = (0,)) -> Facts:
    """Call it, compile it, and compare; an error is a fact too."""
    numbers = whole(devices, grad)
    expected = centralized(numbers, axes) if len(numbers) > 1 else numbers
    try:
        program = jax.jit(function).lower(grad).compile()
        results = (program(grad), function(grad))
    except (NameError, ValueError) as error:
        return {"raises": str(error)}
    return {
        "collectives": collectives(program),
        "error": [np.abs(whole(devices, r) - expected).max() for r in results],
        "keeps": all(
            r.sharding.is_equivalent_to(grad.sharding, r.ndim) and r.dtype == grad.dtype
            for r in results
        ),
    }


def of_this_device(grad: Any) -> Any:
    """One of four gradients, of which `grad` is the mean."""
    return grad * (jax.lax.axis_index("x") + 1) / 2.5


def averaged(grad: Any) -> Any:
    return jax.lax.pmean(grad, "x")


def in_pmap(split: Function, function: Function, join: Function) -> Facts:
    """With one part a device."""
    numbers = rows_and_columns()
    mapped = jax.pmap(function, axis_name="x")
    parts = split(numbers)
    result = np.asarray(mapped(parts))
    return {
        "collectives": collectives(mapped.lower(parts).compile()),
        "error": [np.abs(join(result) - centralized(numbers, (0,))).max()],
        "keeps": result.dtype == numbers.dtype,
    }


def rows(numbers: Any) -> Any:
    return numbers.reshape(8, 2, 24)


# Shape and fan-in axes of each parameter in a train step.
PARAMETERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "up": ((16, 32), (0,)),
    "bias": ((32,), ()),
    "down": ((32, 24), (0,)),
    "conv": ((3, 3, 8, 16), (0, 1, 2)),
    "query": ((16, 4, 8), (0,)),
    "linear": ((24, 16), (1,)),
}


def in_train_step(up: P, down: P, *others: P) -> Facts:
    """Compare a train step under `jax.jit` with GC to one without."""
    devices = mesh()
    given = (up, P(*up[1:]), down, *others)
    specs = dict(zip_longest(PARAMETERS, given, fillvalue=P()))
    params = {n: sharded(devices, specs[n], shape) for n, (shape, _) in PARAMETERS.items()}
    x = sharded(devices, P("x"), (32, 128))
    layouts = {"bias": None, "query": "ioo", "linear": "o...", "*": "...o"}
    gc, sgd = gcx.optax.centralize(layouts), optax.sgd(50.0)
    plain, with_gc = (train_step(tx, params, x) for tx in (sgd, optax.chain(gc, sgd)))
    new = with_gc(params, x)
    start, end, by_plain = (whole(devices, p) for p in (params, new, plain(params, x)))
    keeps, errors = [], []
    for name, weight in new.items():
        move = by_plain[name] - start[name]
        assert np.abs(move).max() > 1e-2
        axes = PARAMETERS[name][1]
        expected = centralized(move, axes) if axes else move
        errors.append(np.abs(end[name] - start[name] - expected).max())
        keeps.append(weight.sharding.is_equivalent_to(params[name].sharding, weight.ndim))
    added, gone = collectives(with_gc), collectives(plain)
    assert not gone - added
    return {"collectives": added - gone, "error": errors, "keeps": all(keeps)}


def train_step(optimizer: optax.GradientTransformation, params: Any, x: Any) -> Any:
    def loss(params: Any, x: Any) -> Any:
        images, x, kinds = x.reshape(-1, 4, 4, 8), x[:, :16], ("NHWC", "HWIO", "NHWC")
        outputs = (
            jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"],
            jax.lax.conv_general_dilated(
                images, params["conv"] / 8, (1, 1), "SAME", None, None, kinds
            ),
            jnp.einsum("be,ehd->bhd", x, params["query"]),
            x @ params["linear"].T,
        )
        return sum((jnp.tanh(output) ** 2).mean() for output in outputs)

    def step(params: Any, x: Any) -> Any:
        grads = jax.grad(loss)(params, x)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    return jax.jit(step).lower(params, x).compile()


# Beside each case: its communication for a kernel of shape (16, 24) on 4 x 2 devices, or what its
# error says.
NOTHING: dict[str, int] = {}
MEANS = {"all-reduce 24": 1}
HALF = {"all-reduce 12": 1}
GRADIENT = {"all-reduce 384": 1}  # averaged by the case itself
UNTOLD = (
    "dense/kernel: this gradient differs along the mesh axis 'x', and its fan-in may be split over "
    "it. If it is, give axis_name={'dense/kernel': 'x'}; if each device holds a whole fan-in, "
    "axis_name={'dense/kernel': None}"
)
Case = tuple[dict[str, int] | str, Callable[[], Facts]]


def case(expected: dict[str, int] | str, run: Callable[..., Facts], *args: Any, **kw: Any) -> Case:
    return expected, partial(run, *args, **kw)


CASES: dict[str, Case] = {
    "fan-in": case(MEANS, in_shard_map, P("x"), gc("x")),
    "fan-in, by path": case(MEANS, in_shard_map, P("x"), gc({"*/kernel": "x"})),
    "fan-in, unchecked": case(MEANS, in_shard_map, P("x"), gc("x"), check_vma=False),
    "fan-in, untold": case(UNTOLD, in_shard_map, P("x"), gc()),
    "fan-in over two axes": case(MEANS, in_shard_map, P(("x", "y")), gc(("x", "y"))),
    "fan-in over two axes, one automatic": case(
        MEANS, in_shard_map, P("x"), gc("x"), axis_names={"x"}
    ),
    "fan-in and fan-out": case(HALF, in_shard_map, P("x", "y"), gc("x")),
    "fan-in, one element a device": case(
        {"all-reduce 6": 1}, in_shard_map, P("x"), gc("x"), shape=(4, 6)
    ),
    "fan-in of one element": case(NOTHING, in_shard_map, P("x"), gc("x"), shape=(1, 6), x=1, y=8),
    "fan-in, bfloat16": case(MEANS, in_shard_map, P("x"), gc("x"), dtype="bfloat16"),
    "fan-out": case(NOTHING, in_shard_map, P(None, "x"), gc({"*": None})),
    "fan-out, unchecked": case(NOTHING, in_shard_map, P(None, "x"), gc(), check_vma=False),
    "fan-out, untold": case(UNTOLD, in_shard_map, P(None, "x"), gc()),
    "whole": case(NOTHING, in_shard_map, P(), gc()),
    "whole, told": case(NOTHING, in_shard_map, P(), gc("x")),
    "whole, fan-in of one, told": case(NOTHING, in_shard_map, P(), gc("x"), shape=(1, 6)),
    "wrong name": case("unbound axis name: z", in_shard_map, P("x"), gc("z")),
    "averaged, then centralized": case(
        GRADIENT, in_shard_map, P(), lambda grad: gc()(averaged(of_this_device(grad)))
    ),
    "centralized, then averaged": case(
        GRADIENT, in_shard_map, P(), lambda grad: averaged(gc({"*": None})(of_this_device(grad)))
    ),
    "not averaged, untold": case(
        UNTOLD, in_shard_map, P(), lambda grad: averaged(gc()(of_this_device(grad)))
    ),
    "derivative": case(
        {"all-reduce 24": 2},
        in_shard_map,
        P("x"),
        jax.grad(lambda grad: (gc("x")(grad) ** 2).sum() / 2),
    ),
    "pmap, fan-in": case(MEANS, in_pmap, rows, gc("x"), lambda parts: parts.reshape(SHAPE)),
    "pmap, averaged": case(
        GRADIENT,
        in_pmap,
        lambda numbers: np.stack([numbers * k / 3.5 for k in range(8)]),
        lambda grad: gc()(averaged(grad)),
        lambda results: results[5],
    ),
    "explicit, whole": case(NOTHING, explicit, P()),
    "explicit, fan-in": case(MEANS, explicit, P("x")),
    "explicit, fan-out": case(NOTHING, explicit, P(None, "x")),
    "explicit, fan-in and fan-out": case(HALF, explicit, P("x", "y")),
    "alone, fan-in": case(MEANS, by_itself, P("x")),
    "rows, fan-out over two axes": case(NOTHING, by_itself, P(("x", "y")), "o..."),
    "rows, fan-in and fan-out": case({"all-reduce 4": 1}, by_itself, P("x", "y"), "o..."),
    "step, whole": case(NOTHING, in_train_step, P(), P()),
    "step, fan-out": case(
        NOTHING,
        in_train_step,
        *(P(None, "x"), P(None, "x")),
        *(P(None, None, None, "x"), P(None, "x", "y"), P("x")),
    ),
    # Of up, of down and linear, and of query; of conv, which is small, the remainder too.
    "step, fan-in": case(
        {"all-reduce 32": 1, "all-reduce 24": 2, "all-reduce 16": 3},
        in_train_step,
        *(P("x"), P("x")),
        *(P(None, None, "x"), P("x", "y"), P(None, "x")),
    ),
    "step, tensor parallel": case(MEANS, in_train_step, P(None, "y"), P("y")),
    "step, fan-in and fan-out": case(
        {"all-reduce 16": 1, "all-reduce 12": 1}, in_train_step, P("x", "y"), P("x", "y")
    ),
    "step, over all devices": case(
        {"all-reduce 32": 1}, in_train_step, P(("x", "y")), P(None, ("x", "y"))
    ),
}


def write_facts() -> None:
    """Run the cases in this process, one of those that `seen_by` starts."""
    report, port, processes, process = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    facts = {name: CASES[name][1]() for name in sys.argv[5:] or CASES}
    if process == 0:
        report.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    write_facts()
