"""Decisions on a model, one file a package, which is imported once the user has a model of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from gcx._frameworks import describe
from gcx._names import flatten
from gcx._rules import Register, Rules
from gcx.layout import Layout
from gcx.optax._models import equinox, flax, haiku
from gcx.optax._models._parameters import LayerAnswer
from gcx.plan import LeaveAlone, PlanRow

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


def layouts(
    model: object, /, *example_inputs: Any, **keyword_inputs: Any
) -> dict[str, Layout | LeaveAlone]:
    """Read the layout of each parameter off a model, by the type of the layer that owns it.

    The axes of a stack of layers (``scan``, ``vmap``, ``layer_stack``) are kept. A layer without a
    rule is left alone.

    Parameters
    ----------
    model : nnx.Module, linen.Module, equinox.Module or haiku.Transformed
        With arrays or with shapes (``nnx.eval_shape``, ``equinox.filter_eval_shape``). A dict, list
        or tuple of nnx or Equinox modules is a model too.
    *example_inputs, **keyword_inputs
        For linen and Haiku: the arguments of ``init`` after the random key, as arrays or
        `jax.ShapeDtypeStruct`. The model is traced on their shapes; nothing is computed.

    Returns
    -------
    dict from str to Layout or LeaveAlone
        By path in the tree that the optimizer gets: ``nnx.state(model, nnx.Param)``,
        ``equinox.filter(model, equinox.is_array)``, ``variables["params"]`` or Haiku's ``params``.

    Raises
    ------
    TypeError
        If `model` is not a model, or has example inputs that it does not need.

    Examples
    --------
    ``gcx.optax.layouts(model, jnp.zeros((1, 28, 28, 1)))`` of a linen model may return
    ``{"Conv_0/kernel": Layout("...o"), "Conv_0/bias": LeaveAlone("bias"), ...}``.
    """
    framework = framework_of(model)
    if framework is None:
        kinds = "an nnx, linen or Equinox module, or the result of haiku.transform"
        raise TypeError(f"model is {kinds}, not {describe(model, 'optax')}")
    if framework.params and (example_inputs or keyword_inputs):
        raise TypeError(f"a {framework.module} module needs no example inputs: give it alone")
    rows = framework.decide(RULES, model, example_inputs, keyword_inputs)
    return {
        name: LeaveAlone(row.reason) if row.layout is None else LayerLayout(row.layout, row.reason)
        for name, row in rows.items()
    }


class LayerLayout(Layout):
    """Layout of a layer's weight; the plan shows the layer."""

    def __init__(self, layout: Layout, layer: str) -> None:
        super().__init__(str(layout), **layout.sizes)
        self.layer: str = layer


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
