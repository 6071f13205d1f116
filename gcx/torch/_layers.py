"""Rules of the layers of torch.nn: the fan-in of each parameter, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import nn

from gcx._decisions import left_alone_by
from gcx._names import is_glob
from gcx._rules import BIAS, EMBEDDING, NORM, Answer, Rule, Rules, RuleT, ask
from gcx.layout import Layout, as_layout
from gcx.plan import LeaveAlone
from gcx.torch._packages import PACKAGES

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_OUTPUT_FIRST = Layout("o...")


class OfRank(NamedTuple):
    """Layout of a weight that has one rank in all layers of a type.

    Another rank means that a wrapper has flattened the weight.
    """

    layout: Layout
    ndim: int


def _transposed_convolution(
    layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
) -> Mapping[str, OfRank | LeaveAlone]:
    # (in, out / groups, kernel...): an output of a group sees the inputs of that group alone.
    groups = layer.groups
    layout = Layout("io...") if groups == 1 else Layout("(bi)o...", b=groups)
    return {"weight": OfRank(layout, 2 + len(layer.kernel_size)), "bias": BIAS}


_ATTENTION: Mapping[str, OfRank | Answer] = {
    "*_proj_weight": OfRank(_OUTPUT_FIRST, 2),
    "*_proj_bias": BIAS,
    "bias_[kv]": LeaveAlone("token: appended to the keys and values"),
}
_RECURRENT: Mapping[str, OfRank | Answer] = {"weight_*": OfRank(_OUTPUT_FIRST, 2), "bias_*": BIAS}
_EMBEDDING = {"weight": EMBEDDING}
_NORM = {"weight": NORM, "bias": BIAS}

TORCH_NN: Mapping[type[nn.Module], Rule[OfRank | Answer]] = {
    nn.Linear: {"weight": OfRank(_OUTPUT_FIRST, 2), "bias": BIAS},
    nn.Bilinear: {"weight": OfRank(_OUTPUT_FIRST, 3), "bias": BIAS},
    nn.MultiheadAttention: _ATTENTION,
    nn.PReLU: {"weight": LeaveAlone("slope of an activation")},
    # (out, in / groups, kernel...): an output of a group sees its inputs alone.
    nn.Conv1d: {"weight": OfRank(_OUTPUT_FIRST, 3), "bias": BIAS},
    nn.Conv2d: {"weight": OfRank(_OUTPUT_FIRST, 4), "bias": BIAS},
    nn.Conv3d: {"weight": OfRank(_OUTPUT_FIRST, 5), "bias": BIAS},
    **dict.fromkeys(TRANSPOSED, _transposed_convolution),
    **dict.fromkeys((nn.RNNBase, nn.RNN, nn.LSTM, nn.GRU), _RECURRENT),
    **dict.fromkeys((nn.RNNCellBase, nn.RNNCell, nn.LSTMCell, nn.GRUCell), _RECURRENT),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), _EMBEDDING),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _NORM),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), _NORM),
}

_RULES: Rules[OfRank | Answer] = Rules({**TORCH_NN, **PACKAGES}, group="gcx.torch.layers")


def register_layer(kind: type[nn.Module]) -> Callable[[RuleT], RuleT]:
    """Declare where the parameters of a layer type have their fan-in.

    Parameters
    ----------
    kind : type
        The class of the layer. Its subclasses follow the rule, unless they have their own.

    Returns
    -------
    callable
        A decorator for the rule: a mapping, or a function of a layer that returns one. Its keys
        are names or globs of the layer's own parameters, its values

        - a layout (``"o..."``, ``"io"``, ``gcx.Layout("(bi)o...", b=4)``), or
        - `gcx.plan.LeaveAlone` with the reason, or None.

        The first name that matches counts; the base classes answer for names that none matches. A
        name with dots belongs to a child (``"scale.weight"``), or to a list or dict of parameters
        (``"codes.*"``), and takes precedence over the child's own rule.

    Raises
    ------
    TypeError
        If `kind` is not a class, or the rule neither a mapping nor a function.
    ValueError
        When a plan is made: if the layer has nothing by a name in the rule that is not a glob.

    Notes
    -----
    A subclass of a torch layer is assumed to use its weight as that layer does. Register a rule for
    one that does not, for example a subclass of `torch.nn.Linear` that holds (in, out).

    A package can declare its rules without importing gcx, by entry points of the group
    ``gcx.torch.layers``. Their names are the qualified names of layers, or globs of them::

        [project.entry-points."gcx.torch.layers"]
        "mypackage.layers.InputFirst" = "mypackage.gcx_rules:input_first"

    A rule needs no import from gcx: layouts can be text, and None leaves a parameter alone.

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
        is_rule = callable(rule) or isinstance(rule, Mapping)
        registered(partial(_ask_checked, rule, kind) if is_rule else rule)
        return rule

    return decorator


def _ask_checked(
    rule: Rule[Answer], kind: type[nn.Module], layer: nn.Module
) -> Mapping[str, Answer]:
    """Ask a rule; a ValueError if it names something that the layer does not have."""
    answers = ask(rule, layer, kind.__name__)
    # hasattr() would compute parametrized weights, and dir() leaves out names of digits.
    children, parameters = layer.named_children(), layer.named_parameters(recurse=False)
    known = {*dir(layer), *dict(children), *dict(parameters)}
    for key in answers:
        if not is_glob(key) and key.partition(".")[0] not in known:
            msg = (
                f"the rule of {kind.__name__} speaks of {key!r}, which this {type(layer).__name__} "
                "does not have; a name that only some of the layers have can be a glob"
            )
            raise ValueError(msg)
    return answers


def answer(layer: nn.Module, name: str) -> tuple[OfRank | Layout | LeaveAlone, str] | None:
    """Ask the rule of a layer about its parameter `name`; the second is the name of that rule.

    None means that no rule knows the parameter.
    """
    known = _RULES.find(layer, name)
    if known is None:
        return None
    found, rule = known
    if found is None:
        return left_alone_by(rule), rule
    if isinstance(found, (LeaveAlone, OfRank)):
        return found, rule
    try:
        return as_layout(found), rule
    except (TypeError, ValueError) as error:
        msg = f"the rule of {rule} answers {found!r} for {name!r}: {error}"
        raise type(error)(msg) from None
