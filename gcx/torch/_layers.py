"""What each type of layer says about its parameters: where the fan-in is, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from gcx._globs import is_glob
from gcx._rules import BIAS, EMBEDDING, NORM, Rule, Rules, RuleT
from gcx.layout import Layout, LayoutLike
from gcx.plan import LeaveAlone
from gcx.torch._packages import PACKAGES
from gcx.torch._weights import FanIn, as_fan_in

Answer = FanIn | LayoutLike | LeaveAlone | None

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _linear(_: nn.Linear) -> Mapping[str, Answer]:
    return {"weight": FanIn(ndim=2), "bias": BIAS}


def _bilinear(_: nn.Bilinear) -> Mapping[str, Answer]:
    return {"weight": FanIn(ndim=3), "bias": BIAS}


def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Mapping[str, Answer]:
    # (out, in / groups, kernel...): the fan-in of a grouped convolution is that of its group.
    return {"weight": FanIn(ndim=2 + len(layer.kernel_size)), "bias": BIAS}


def _transposed_convolution(
    layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
) -> Mapping[str, Answer]:
    # (in, out / groups, kernel...): an output of a group sees the inputs of that group alone.
    layout = Layout("io...") if layer.groups == 1 else Layout("oio...")
    weight = FanIn(layout, 2 + len(layer.kernel_size), layer.groups)
    return {"weight": weight, "bias": BIAS}


def _attention(_: nn.MultiheadAttention) -> Mapping[str, Answer]:
    return {
        "*_proj_weight": FanIn(ndim=2),
        "*_proj_bias": BIAS,
        "bias_[kv]": LeaveAlone("token: appended to the keys and values"),
    }


def _recurrent(_: nn.RNNBase | nn.RNNCellBase) -> Mapping[str, Answer]:
    return {"weight_*": FanIn(ndim=2), "bias_*": BIAS}


def _embedding(_: nn.Module) -> Mapping[str, Answer]:
    return {"weight": EMBEDDING}


def _norm(_: nn.Module) -> Mapping[str, Answer]:
    return {"weight": NORM, "bias": BIAS}


def _activation(_: nn.PReLU) -> Mapping[str, Answer]:
    return {"weight": LeaveAlone("slope of an activation")}


TORCH_NN: Mapping[type[nn.Module], Rule[Answer]] = {
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.MultiheadAttention: _attention,
    nn.PReLU: _activation,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(TRANSPOSED, _transposed_convolution),
    **dict.fromkeys((nn.RNNBase, nn.RNN, nn.LSTM, nn.GRU), _recurrent),
    **dict.fromkeys((nn.RNNCellBase, nn.RNNCell, nn.LSTMCell, nn.GRUCell), _recurrent),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), _embedding),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _norm),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), _norm),
}

_RULES: Rules[Answer] = Rules({**TORCH_NN, **PACKAGES}, group="gcx.torch.layers")


def register_layer(kind: type[nn.Module]) -> Callable[[RuleT], RuleT]:
    """Tell what the parameters of a layer type are, for `plan` and all that centralizes.

    Parameters
    ----------
    kind : type
        The class of the layer. Its subclasses follow the rule, unless they have their own.

    Returns
    -------
    callable
        A decorator for the rule: a function of a layer that returns, by name or glob of the
        layer's own parameters, one of

        - a layout (``"o..."``, ``"io"``) of the weight, or a `FanIn` for one in groups;
        - `gcx.plan.LeaveAlone` with the reason, or None.

        The first name that matches counts, and what none matches is asked of the base classes.
        A name with dots is one of a child (``"scale.weight"``), or of a list or dict of parameters
        (``"codes.*"``), and comes before what the child says itself.

    Raises
    ------
    TypeError
        If `kind` is not a class, or the rule not a function.
    ValueError
        When the rule is asked: if a name in it, other than a glob, is of nothing in the layer.

    Notes
    -----
    A subclass of a layer of torch is taken for one that uses its weight as that layer does. If
    yours does not, such as a subclass of `torch.nn.Linear` that holds (in, out), nothing about it
    says so: register a rule for it.

    A package can bring its rules without importing gcx, by entry points of the group
    ``gcx.torch.layers``, whose names are the qualified names of layers, or globs of them::

        [project.entry-points."gcx.torch.layers"]
        "mypackage.layers.InputFirst" = "mypackage.gcx_rules:input_first"

    A rule without layouts needs nothing of gcx: None leaves a parameter alone.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> from gcx.plan import LeaveAlone
    >>> class InputFirst(torch.nn.Module):
    ...     def __init__(self, inputs: int, outputs: int) -> None:
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.randn(inputs, outputs))
    ...         self.offset = torch.nn.Parameter(torch.zeros(1, outputs))
    >>> @gcx.torch.register_layer(InputFirst)
    ... def input_first(layer):
    ...     return {"weight": "io", "offset": LeaveAlone("bias")}
    >>> print(gcx.torch.plan(InputFirst(4, 3)))
    parameter  shape  layout  reason
    weight     4x3    io      InputFirst
    offset     1x3    -       bias
    1 of 2 parameters centralized
    """
    registered = _RULES.register(kind)

    def decorator(rule: RuleT) -> RuleT:
        registered(partial(_checked, rule, kind) if callable(rule) else rule)
        return rule

    return decorator


def _checked(rule: Rule[Answer], kind: type[nn.Module], layer: nn.Module) -> Mapping[str, Answer]:
    """Ask a rule, and see that it is not spoiled by a typo."""
    answers = rule(layer)
    # hasattr() would compute parametrized weights, and dir() leaves out names of digits.
    children, parameters = layer.named_children(), layer.named_parameters(recurse=False)
    known = {*dir(layer), *dict(children), *dict(parameters)}
    for key in answers if isinstance(answers, Mapping) else ():
        if not is_glob(key) and key.partition(".")[0] not in known:
            msg = (
                f"the rule of {kind.__name__} speaks of {key!r}, which this {type(layer).__name__} "
                "does not have; a name that only some of the layers have can be a glob"
            )
            raise ValueError(msg)
    return answers


def answer(layer: nn.Module, name: str) -> tuple[FanIn | LeaveAlone, str] | None:
    """Ask the rule of a layer about its parameter `name`; the second is the name of that rule.

    None means that no rule knows the parameter.
    """
    known = _RULES.find(layer, name)
    if known is None:
        return None
    found, rule = known
    if found is None:
        return LeaveAlone(f"left alone by the rule of {rule}"), rule
    if isinstance(found, LeaveAlone):
        return found, rule
    try:
        return as_fan_in(found), rule
    except (TypeError, ValueError) as error:
        msg = f"the rule of {rule} answers {found!r} for {name!r}: {error}"
        raise type(error)(msg) from None
