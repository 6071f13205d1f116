"""The frameworks that gcx knows, and which of them a model is of.

None is imported before a model of it comes along.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gcx._rules import Rules, RuleT
from gcx.optax._models import equinox, haiku, linen, nnx
from gcx.optax._models._decision import Decision, KernelAnswer

RULES: Rules[KernelAnswer] = Rules(
    {**equinox.RULES, **haiku.RULES, **linen.RULES, **nnx.RULES}, group="gcx.optax.layers"
)


class Framework(NamedTuple):
    """How to recognise the models of a framework, and how to read one."""

    module: str
    models: tuple[str, ...]
    decide: Callable[..., dict[str, Decision]]
    needs_inputs: bool  # it has no layers, or none with shapes, before it is called


_FRAMEWORKS = (
    Framework("equinox", ("Module",), equinox.decide, needs_inputs=False),
    Framework("flax.nnx", ("Module",), nnx.decide, needs_inputs=False),
    Framework("flax.linen", ("Module",), linen.decide, needs_inputs=True),
    Framework("haiku", ("Transformed", "TransformedWithState"), haiku.decide, needs_inputs=True),
)


def framework_of(model: object) -> Framework | None:
    """Find the framework that a model is of; None if it is not a model."""
    for framework in _FRAMEWORKS:
        # Who has a model has imported its framework.
        module = sys.modules.get(framework.module)
        if module is not None:
            kinds = tuple(getattr(module, name) for name in framework.models)
            if isinstance(model, kinds):
                return framework
    return None


def decide(
    model: object, inputs: Sequence[Any] = (), keyword_inputs: Mapping[str, Any] | None = None
) -> dict[str, Decision]:
    """Decide on each parameter of a model by the layer that owns it.

    Raises
    ------
    TypeError
        If `model` is not a model, or example inputs are given to one that needs none.
    """
    framework = framework_of(model)
    if framework is None:
        msg = (
            "model is an nnx, linen or Equinox module, or what haiku.transform has made, not "
            f"{type(model).__name__}"
        )
        raise TypeError(msg)
    if framework.needs_inputs:
        return framework.decide(RULES, model, inputs, keyword_inputs or {})
    if inputs or keyword_inputs:
        msg = f"a module of {framework.module} is read as it is: give it without example inputs"
        raise TypeError(msg)
    return framework.decide(RULES, model)


def register_layer(kind: type) -> Callable[[RuleT], RuleT]:
    """Declare where the parameters of a layer type have their fan-in: decorates its rule.

    Parameters
    ----------
    kind : type
        The class of a layer of nnx, linen, Equinox or Haiku; its subclasses follow.

    Returns
    -------
    callable
        Decorator of a function that takes such a layer, and returns a mapping from the name of each
        of its own parameters, or a glob of names, to a layout, `LeaveAlone` or None. A layout
        without ``...`` is that of a single layer: a stack of layers has more axes in front. In
        linen and Haiku the function is called while the layer is.

    Raises
    ------
    TypeError
        If `kind` is not a class.

    Notes
    -----
    A package brings rules without importing gcx by entry points of the group
    ``gcx.optax.layers``: the name is the qualified name of the class
    (``my_package.layers.Experts``), the object the rule.

    Examples
    --------
    >>> import gcx.optax
    >>> from gcx.plan import LeaveAlone
    >>> class Experts:  # of nnx.Module, say
    ...     pass
    >>> @gcx.optax.register_layer(Experts)
    ... def experts(layer):
    ...     return {"w_in": "oio", "w_out": "oio", "router": "io", "bias_*": LeaveAlone("bias")}
    """
    return RULES.register(kind)
