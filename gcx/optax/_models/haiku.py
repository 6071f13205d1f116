"""Haiku models: the modules of a call, watched while it is traced on shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gcx._rules import BIAS, EMBEDDING, MASKED, NORM, Rule, Rules
from gcx.optax._models._parameters import (
    ALL_GATES,
    IN_GROUPS,
    Answers,
    LayerAnswer,
    Seen,
    SingleLayer,
    decide_all,
    join,
    trace_shapes,
)
from gcx.plan import PlanRow


def decide(
    rules: Rules[LayerAnswer], model: Any, inputs: Any, keyword_inputs: Any
) -> dict[str, PlanRow]:
    """Decide on each parameter of a model that ``haiku.transform`` returned."""
    import haiku as hk
    import jax

    # Parameters that the active calls have seen, the innermost call last.
    calls: list[dict[str, Seen]] = [{}]

    def watch(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        # layer_stack lifts a layer, and applies it after its init under shorter names.
        if context.method_name in ("params_dict", "state_dict") or not hk.running_init():
            return method(*args, **kwargs)
        calls.append({})
        output = method(*args, **kwargs)
        seen, module = calls.pop(), context.module
        for full_name, array in module.params_dict().items():
            name = full_name.removeprefix(f"{module.module_name}/")
            if full_name not in seen and name in seen:
                # A lifted layer, whose name was shorter inside.
                seen[full_name] = seen.pop(name)
            elif full_name not in seen and "/" not in name:
                seen[full_name] = Seen(*rules.answer(module, name), array.shape)
        calls[-1] = join(calls[-1], seen)
        return output

    def params(*inputs: Any, **keyword_inputs: Any) -> Any:
        made = model.init(jax.random.key(0), *inputs, **keyword_inputs)
        return made[0] if isinstance(model, hk.TransformedWithState) else made

    with hk.intercept_methods(watch):
        shapes = trace_shapes(params, inputs, keyword_inputs)
    return decide_all(calls[0], shapes)


def _convolution(layout: str) -> Rule[LayerAnswer]:
    def rule(layer: Any) -> Answers:
        is_grouped = getattr(layer, "feature_group_count", 1) > 1
        weight = SingleLayer(layout, maps=IN_GROUPS if is_grouped else "")
        return {"w": weight if layer.mask is None else MASKED, "b": BIAS}

    return rule


RULES: dict[str, Rule[LayerAnswer]] = {
    "haiku.*.Linear": {"w": "io", "b": BIAS},
    # (kernel..., in / groups, out): a unit sees the inputs of its own group.
    "haiku.*.ConvND": _convolution("...o"),
    "haiku.*.DepthwiseConvND": {"w": SingleLayer("...o", maps=IN_GROUPS), "b": BIAS},
    "haiku.*.ConvNDTranspose": _convolution("...oi"),
    "haiku.*.GRU": {"w_[ih]": SingleLayer("io", maps=ALL_GATES), "b": BIAS},
    "haiku.*.Embed": {"embeddings": EMBEDDING},
    "haiku.*.Bias": {"b": BIAS},
    "haiku.*Norm": {"scale": NORM, "offset": BIAS},
}
