"""Decisions on a model, one file a package, which is imported once the user has a model of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gcx._frameworks import describe
from gcx._names import flatten
from gcx._rules import Register, Rules
from gcx.optax._models import equinox, flax, haiku
from gcx.optax._models._parameters import LayerAnswer
from gcx.plan import PlanRow

RULES: Rules[LayerAnswer] = Rules(
    {**equinox.RULES, **flax.RULES, **haiku.RULES}, group="gcx.optax.layers"
)
register_layer: Register = RULES.register


class Framework(NamedTuple):
    module: str
    models: tuple[str, ...]
    decide: Callable[..., dict[str, PlanRow]]  # of the rules, a model and its example inputs
    # Return the parameters of a model; None if a model has no layers before it is called.
    params: Callable[[Any], Any] | None


_FRAMEWORKS = (
    Framework("equinox", ("Module",), equinox.decide, equinox.params),
    Framework("flax.nnx", ("Module",), flax.decide_nnx, flax.nnx_params),
    Framework("flax.linen", ("Module",), flax.decide_linen, None),
    Framework("haiku", ("Transformed", "TransformedWithState"), haiku.decide, None),
)


def framework_of(model: object) -> Framework | None:
    """Find the framework of a model, or of the modules in a dict, list or tuple; None if none."""
    parts = [model, *(part for _, part in flatten(model))]
    for framework in _FRAMEWORKS:
        # A model exists only if its framework is imported.
        module = sys.modules.get(framework.module)
        kinds = tuple([getattr(module, name) for name in framework.models]) if module else ()
        if any(isinstance(part, kinds) for part in (parts if framework.params else [model])):
            return framework
    return None


def decide(
    model: object, inputs: Sequence[Any] = (), keyword_inputs: Mapping[str, Any] | None = None
) -> dict[str, PlanRow]:
    framework = framework_of(model)
    if framework is None:
        kinds = "an nnx, linen or Equinox module, or the result of haiku.transform"
        raise TypeError(f"model is {kinds}, not {describe(model, 'optax')}")
    if framework.params and (inputs or keyword_inputs):
        raise TypeError(f"a {framework.module} module needs no example inputs: give it alone")
    return framework.decide(RULES, model, inputs, keyword_inputs or {})
