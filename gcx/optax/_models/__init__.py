"""Decisions on the parameters of a model, one file a framework.

No framework is imported before the user has a model of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gcx._names import flatten
from gcx._rules import Rules, RuleT
from gcx.optax._models import equinox, haiku, linen, nnx
from gcx.optax._models._parameters import LayerAnswer
from gcx.plan import PlanRow

RULES: Rules[LayerAnswer] = Rules(
    {**equinox.RULES, **haiku.RULES, **linen.RULES, **nnx.RULES}, group="gcx.optax.layers"
)


class Framework(NamedTuple):
    """Classes of a framework's models, and the functions that read them."""

    module: str
    models: tuple[str, ...]
    decide: Callable[..., dict[str, PlanRow]]
    # Return the parameters of a model; None if a model has no layers before it is called.
    params: Callable[[Any], Any] | None


_FRAMEWORKS = (
    Framework("equinox", ("Module",), equinox.decide, equinox.params),
    Framework("flax.nnx", ("Module",), nnx.decide, nnx.params),
    Framework("flax.linen", ("Module",), linen.decide, None),
    Framework("haiku", ("Transformed", "TransformedWithState"), haiku.decide, None),
)


def framework_of(model: object) -> Framework | None:
    """Find the framework of a model; None if it is not a model.

    A dict, list or tuple that holds modules has their framework.
    """
    for framework in _FRAMEWORKS:
        # A model exists only if its framework is imported.
        module = sys.modules.get(framework.module)
        if module is not None:
            kinds = tuple(getattr(module, name) for name in framework.models)
            if isinstance(model, kinds) or any(isinstance(x, kinds) for _, x in flatten(model)):
                return framework
    return None


def decide(
    model: object, inputs: Sequence[Any] = (), keyword_inputs: Mapping[str, Any] | None = None
) -> dict[str, PlanRow]:
    framework = framework_of(model)
    is_tree = type(model) in (dict, list, tuple)
    if framework is None or (is_tree and framework.params is None):
        kinds = "an nnx, linen or Equinox module, or the result of haiku.transform"
        msg = f"model is {kinds}, not {type(model).__name__}"
        raise TypeError(msg)
    if framework.params is None:
        return framework.decide(RULES, model, inputs, keyword_inputs or {})
    if inputs or keyword_inputs:
        msg = f"a {framework.module} module needs no example inputs: give the module alone"
        raise TypeError(msg)
    return framework.decide(RULES, model)


def register_layer(kind: type) -> Callable[[RuleT], RuleT]:
    """Declare the parameters of a layer type, for `layouts` and `centralize`.

    Parameters
    ----------
    kind : type
        The class of an nnx, linen, Equinox or Haiku layer; its subclasses follow.

    Returns
    -------
    callable
        Decorator for a rule: a mapping from names of the layer's own parameters, or globs, to
        layouts of a single layer (gcx adds the axes of a stack), `LeaveAlone` or None; or a
        function of a layer that returns one, in linen and Haiku while the layer is called. Entry
        points, of the group ``gcx.optax.layers``, are as in `gcx.torch.register_layer`.

    Raises
    ------
    TypeError
        If `kind` is not a class, or the rule neither a mapping nor a function.

    Examples
    --------
    >>> import gcx.optax
    >>> class Experts:  # a subclass of nnx.Module, for example
    ...     pass
    >>> @gcx.optax.register_layer(Experts)
    ... def experts(layer):
    ...     return {"w_in": "bio", "w_out": "bio", "router": "io", "bias_*": None}
    """
    return RULES.register(kind)
