"""Flax linen models: the modules of a call, watched while it is traced on shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gcx._einsum import kernel_letters
from gcx._rules import BIAS, EMBEDDING, LENGTH, MASKED, NORM, SLOPE, Rule, Rules
from gcx.optax._models._parameters import (
    Answers,
    LayerAnswer,
    Seen,
    SingleLayer,
    decide_all,
    join,
    trace_shapes,
)
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone, PlanRow


def decide(
    rules: Rules[LayerAnswer], model: Any, inputs: Any, keyword_inputs: Any
) -> dict[str, PlanRow]:
    """Decide on each parameter of a linen module, by its name within ``"params"``."""
    import jax
    from flax import linen as nn

    # Parameters that the active calls have seen, the innermost call last.
    calls: list[dict[str, Seen]] = [{}]

    def watch(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        before = _parameters(module)
        calls.append({})
        output = method(*args, **kwargs)
        seen = calls.pop()
        for name, leaf in _parameters(module).items():
            full_name = "/".join([*module.path, name])
            # True if this call made it, and not a call inside.
            if name not in before and full_name not in seen:
                seen[full_name] = Seen(*rules.answer(module, name), leaf.shape)
        calls[-1] = join(calls[-1], seen)
        return output

    def params(*inputs: Any, **keyword_inputs: Any) -> Any:
        return model.init(jax.random.key(0), *inputs, **keyword_inputs).get("params", {})

    with nn.intercept_methods(watch):
        shapes = trace_shapes(params, inputs, keyword_inputs)
    (seen,) = calls
    return decide_all(seen, shapes)


def _parameters(module: Any) -> dict[str, Any]:
    """Find the parameters that a module and the modules inside it have so far."""
    if module.scope is None:
        return {}
    return dict(named_leaves(module.variables.get("params", {})))


def einsum_kernel(equation: str | None) -> LayerAnswer:
    """Layout of an einsum kernel, or the reason why there is none.

    >>> einsum_kernel("bi,io->bo")
    'io'
    """
    if equation is None:
        return LeaveAlone("unknown: the einsum string came with the call")
    if "..." in equation.split("->")[0].split(",")[1]:
        return LeaveAlone("unknown: an ellipsis in the kernel of an einsum")
    letters = kernel_letters(equation)
    return letters if "i" in letters else LeaveAlone("no fan-in: nothing is summed over")


def _einsum(layer: Any) -> Answers:
    return {"kernel": einsum_kernel(layer.einsum_str), "bias": BIAS}


def _dense_general(layer: Any) -> Answers:
    batch, inputs, outputs = map(_length, (layer.batch_dims, layer.axis, layer.features))
    return {"kernel": "b" * batch + "i" * inputs + "o" * outputs, "bias": BIAS}


def _convolution(layer: Any) -> Answers:
    # (kernel..., in / groups, out): a unit sees the inputs of its own group.
    layout = "...oi" if getattr(layer, "transpose_kernel", False) else "...o"
    is_grouped = getattr(layer, "feature_group_count", 1) > 1
    kernel = SingleLayer(layout, is_grouped=is_grouped)
    return {"kernel": kernel if layer.mask is None else MASKED, "bias": BIAS}


def _local_convolution(layer: Any) -> Answers:
    # (pixels of the output..., patch * in, out): each pixel has its own layer.
    layout = "b" * _length(layer.kernel_size) + "io"
    return {"kernel": layout if layer.mask is None else MASKED, "bias": BIAS}


def _length(number_or_sequence: Any) -> int:
    return 1 if isinstance(number_or_sequence, int) else len(number_or_sequence)


_DENSE: Answers = {"kernel": "io", "bias": BIAS}
_NORM: Answers = {"scale": NORM, "bias": BIAS}
_NORMS = ("Batch", "Layer", "Group", "RMS", "Instance")

RULES: dict[str, Rule[LayerAnswer]] = {
    "flax.linen.*.DenseGeneral": _dense_general,
    "flax.linen.*.Einsum": _einsum,
    "flax.linen.*.ConvLocal": _local_convolution,
    "flax.linen.*.Embed": {"embedding": EMBEDDING},
    "flax.linen.*.WeightNorm": {"*/scale": LENGTH},
    "flax.linen.*.PReLU": {"negative_slope": SLOPE},
    **dict.fromkeys(("flax.linen.*.Dense", "flax.linen.*.DenseParams"), _DENSE),
    **dict.fromkeys([f"flax.linen.*.{kind}Norm" for kind in _NORMS], _NORM),
    **dict.fromkeys(("flax.linen.*.Conv", "flax.linen.*.ConvTranspose"), _convolution),
}
