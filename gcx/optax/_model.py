"""Layouts read off a model, by the types of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gcx._rules import RuleT
from gcx.layout import Layout
from gcx.optax._layers._frameworks import RULES, decide
from gcx.plan import LeaveAlone


def layouts(
    model: object, /, *example_inputs: Any, **keyword_inputs: Any
) -> dict[str, Layout | LeaveAlone]:
    """Read off a model where the fan-in of each of its parameters is.

    Each parameter is judged by the type of the layer that owns it, never by its name or its rank. A
    subclass follows its base class. Where layers are stacked (``scan``, ``vmap``, ``layer_stack``),
    the axes of the stack are kept. A layer that nobody declared is left alone, and says so.

    Parameters
    ----------
    model : nnx.Module, linen.Module, equinox.Module or haiku.Transformed
        Of concrete arrays or of shapes (``nnx.eval_shape``, ``equinox.filter_eval_shape``).
    *example_inputs, **keyword_inputs
        For linen and Haiku what their ``init`` takes after the random key: arrays, or
        `jax.ShapeDtypeStruct`. The model is traced on their shapes; nothing is computed.

    Returns
    -------
    dict from str to Layout or LeaveAlone
        For `centralize` and `plan`; change in it what you know better. The names are those of the
        parameters as an optimizer gets them: of ``nnx.state(model, nnx.Param)``, of
        ``equinox.filter(model, equinox.is_array)``, of linen's ``variables["params"]`` (put
        ``"params/"`` in front if you optimize all of `variables`), and of Haiku's ``params``.

    Raises
    ------
    TypeError
        If `model` is not a model, or is given example inputs that it does not need.

    See Also
    --------
    register_layer : declare a layer of your own.

    Examples
    --------
    >>> import gcx.optax
    >>> gcx.optax.layouts("flax")
    Traceback (most recent call last):
        ...
    TypeError: model is an nnx, linen or Equinox module, or what haiku.transform has made, not str

    ``gcx.optax.layouts(model, jnp.zeros((1, 28, 28, 1)))`` of a linen model may give
    ``{"Conv_0/kernel": Layout("...o"), "Conv_0/bias": LeaveAlone("bias"), ...}``.
    """
    decisions = decide(model, example_inputs, keyword_inputs)
    return {name: layout or LeaveAlone(why) for name, (layout, why) in decisions.items()}


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
