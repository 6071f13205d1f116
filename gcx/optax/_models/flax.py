"""Flax models: nnx graphs, and the calls of linen modules, watched while traced on shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gcx._decisions import merge
from gcx._rules import BIAS, EMBEDDING, LENGTH, MASKED, NORM, SLOPE, Rule, Rules, kernel_letters
from gcx.optax._models._parameters import (
    Answers,
    LayerAnswer,
    Seen,
    SingleLayer,
    decide_by_calls,
    decide_in_stack,
)
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone, PlanRow


def nnx_params(model: Any) -> Any:
    from flax import nnx

    return nnx.state(model, nnx.Param)


def decide_nnx(rules: Rules[LayerAnswer], model: Any, *_: Any) -> dict[str, PlanRow]:
    """Decide on each `nnx.Param` in a tree of nnx modules, by its name in ``nnx.state``."""
    from flax import nnx

    nodes = list(nnx.iter_graph(model))
    # Lists and dicts of modules are modules too, but not layers.
    layers = {
        path: node
        for path, node in nodes
        if isinstance(node, nnx.Module) and not isinstance(node, (Sequence, Mapping))
    }

    rows: dict[tuple[int, str], list[PlanRow]] = {}

    def add(param: Any, owner: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
        for inside, leaf in named_leaves(param):
            own = _joined((*rest, inside) if inside else rest)
            answer, rule = rules.answer(layers.get(owner, model), own)
            row = decide_in_stack(_joined((*owner, own)), getattr(leaf, "shape", ()), answer, rule)
            rows.setdefault((id(param), inside), []).append(row)

    for path, param in nodes:
        if isinstance(param, nnx.Param):
            owner = next((path[:k] for k in range(len(path), 0, -1) if path[:k] in layers), ())
            add(param, owner, path[len(owner) :])
    # Each node comes once; a tied parameter belongs to further layers.
    for owner, layer in layers.items():
        for key, param in vars(layer).items():
            if isinstance(param, nnx.Param):
                add(param, owner, (key,))
    return {of_one[0].name: merge(of_one) for of_one in rows.values()}


def _joined(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def decide_linen(
    rules: Rules[LayerAnswer], model: Any, inputs: Any, keyword_inputs: Any
) -> dict[str, PlanRow]:
    """Decide on each parameter of a linen module, by its name within ``"params"``."""
    import jax
    from flax import linen as nn

    def enter(context: Any) -> Callable[[dict[str, Seen]], None]:
        module = context.module
        before = _parameters(module)

        def leave(seen: dict[str, Seen]) -> None:
            for name, leaf in _parameters(module).items():
                full_name = "/".join([*module.path, name])
                # True if this call made it, and not a call inside.
                if name not in before and full_name not in seen:
                    seen[full_name] = Seen(*rules.answer(module, name), getattr(leaf, "shape", ()))

        return leave

    def init(*inputs: Any, **keyword_inputs: Any) -> Any:
        return model.init(jax.random.key(0), *inputs, **keyword_inputs).get("params", {})

    return decide_by_calls(nn.intercept_methods, enter, init, inputs, keyword_inputs)


def _parameters(module: Any) -> dict[str, Any]:
    """Find the parameters that a module and the modules inside it have so far."""
    return dict(named_leaves(module.variables.get("params", {}) if module.scope else {}))


def einsum_layout(equation: str | None) -> str | LeaveAlone:
    """Find the layout of an einsum kernel, or the reason why there is none."""
    if equation is None:
        return LeaveAlone("unknown: the einsum string came with the call")
    if "..." in equation.split("->")[0].split(",")[1]:
        return LeaveAlone("unknown: an ellipsis in the kernel of an einsum")
    letters = kernel_letters(equation)
    return letters if "i" in letters else LeaveAlone("no fan-in: nothing is summed over")


def _einsum(layer: Any) -> Answers:
    found: LayerAnswer = einsum_layout(layer.einsum_str)
    if isinstance(found, str) and hasattr(layer, "kernel_shape"):  # of nnx
        found = SingleLayer(found, tuple(layer.kernel_shape))
    return {"kernel": found, "bias": BIAS}


def _nnx_linear(layer: Any) -> Answers:
    return {"kernel": SingleLayer("io", (layer.in_features, layer.out_features)), "bias": BIAS}


def _nnx_linear_general(layer: Any) -> Answers:
    axes = {"b": layer.batch_axis.values(), "i": layer.in_features, "o": layer.out_features}
    letters = "".join(letter * len(sizes) for letter, sizes in axes.items())
    shape = tuple(size for sizes in axes.values() for size in sizes)
    return {"kernel": SingleLayer(letters, shape), "bias": BIAS}


def _linen_dense_general(layer: Any) -> Answers:
    batch, inputs, outputs = map(_length, (layer.batch_dims, layer.axis, layer.features))
    return {"kernel": "b" * batch + "i" * inputs + "o" * outputs, "bias": BIAS}


def _convolution(layer: Any) -> Answers:
    # (kernel..., in / groups, out): a unit sees the inputs of its own group.
    layout = "...oi" if getattr(layer, "transpose_kernel", False) else "...o"
    shape = getattr(layer, "kernel_shape", None)  # of nnx
    kernel = SingleLayer(layout, shape, in_groups=getattr(layer, "feature_group_count", 1) > 1)
    return {"kernel": kernel if layer.mask is None else MASKED, "bias": BIAS}


def _local_convolution(layer: Any) -> Answers:
    # (pixels of the output..., patch * in, out): each pixel has its own layer.
    layout = "b" * _length(layer.kernel_size) + "io"
    return {"kernel": layout if layer.mask is None else MASKED, "bias": BIAS}


def _length(number_or_sequence: Any) -> int:
    return 1 if isinstance(number_or_sequence, int) else len(number_or_sequence)


_DENSE: Answers = {"kernel": "io", "bias": BIAS}

RULES: dict[str, Rule[LayerAnswer]] = {
    "flax.linen.*.Dense": _DENSE,
    "flax.linen.*.DenseParams": _DENSE,
    "flax.linen.*.DenseGeneral": _linen_dense_general,
    "flax.linen.*.ConvLocal": _local_convolution,
    "flax.linen.*.WeightNorm": {"*/scale": LENGTH},
    "flax.nnx.*.Linear": _nnx_linear,
    "flax.nnx.*.LinearGeneral": _nnx_linear_general,
    "flax.nnx.*.LoRA": {"lora_a": "io", "lora_b": "io"},
    "flax.*.Conv": _convolution,
    "flax.*.ConvTranspose": _convolution,
    "flax.*.Einsum": _einsum,
    "flax.*.Embed": {"embedding": EMBEDDING},
    "flax.*.PReLU": {"negative_slope": SLOPE},
    "flax.*Norm": {"scale": NORM, "bias": BIAS},
}
