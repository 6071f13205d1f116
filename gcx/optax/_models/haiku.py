"""Haiku models: the modules of a call, watched while it is traced on shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gcx._rules import BIAS, EMBEDDING, MASKED, NORM, Rule, Rules
from gcx.optax._models._parameters import Answers, LayerAnswer, Seen, SingleLayer, decide_by_calls
from gcx.plan import PlanRow


def decide(
    rules: Rules[LayerAnswer], model: Any, inputs: Any, keyword_inputs: Any
) -> dict[str, PlanRow]:
    """Decide on each parameter of a model that ``haiku.transform`` returned."""
    import haiku as hk
    import jax

    def enter(context: Any) -> Callable[[dict[str, Seen]], None] | None:
        # layer_stack lifts a layer, and applies it after its init under shorter names.
        if context.method_name in ("params_dict", "state_dict") or not hk.running_init():
            return None
        module = context.module

        def leave(seen: dict[str, Seen]) -> None:
            for full_name, array in module.params_dict().items():
                name = full_name.removeprefix(f"{module.module_name}/")
                if full_name not in seen and name in seen:
                    # A lifted layer, whose name was shorter inside.
                    seen[full_name] = seen.pop(name)
                elif full_name not in seen and "/" not in name:
                    seen[full_name] = Seen(*rules.answer(module, name), array.shape)

        return leave

    def init(*inputs: Any, **keyword_inputs: Any) -> Any:
        made = model.init(jax.random.key(0), *inputs, **keyword_inputs)
        return made[0] if isinstance(model, hk.TransformedWithState) else made

    return decide_by_calls(hk.intercept_methods, enter, init, inputs, keyword_inputs)


def _convolution(layout: str, layer: Any) -> Answers:
    weight = SingleLayer(layout, in_groups=getattr(layer, "feature_group_count", 1) > 1)
    return {"w": weight if layer.mask is None else MASKED, "b": BIAS}


RULES: dict[str, Rule[LayerAnswer]] = {
    "haiku.*.Linear": {"w": "io", "b": BIAS},
    # (kernel..., in / groups, out): a unit sees the inputs of its own group.
    "haiku.*.ConvND": partial(_convolution, "...o"),
    "haiku.*.DepthwiseConvND": {"w": SingleLayer("...o", in_groups=True), "b": BIAS},
    "haiku.*.ConvNDTranspose": partial(_convolution, "...oi"),
    "haiku.*.GRU": {"w_[ih]": SingleLayer("io", all_gates=True), "b": BIAS},
    "haiku.*.Embed": {"embeddings": EMBEDDING},
    "haiku.*.Bias": {"b": BIAS},
    "haiku.*Norm": {"scale": NORM, "offset": BIAS},
}
