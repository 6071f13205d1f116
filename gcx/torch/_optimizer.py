"""An optimizer's own part in a step: the weight decay it adds, the momentum it keeps, its rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import unwrap
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gcx._options import Decay
from gcx.backends import _torch
from gcx.torch._weights import Group, Rate, Weight

State = dict[str, Any]  # of one parameter
Means = dict[str, Tensor]  # by a key of the state

# By this key a parameter group says that a step shrinks the weights, apart from the gradient.
_DECOUPLES = "decoupled_weight_decay"

# Classes that set this key in every group; their subclasses inherit it, whatever their steps do.
_SET_BY_DEFAULT = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)

# Keys of running sums of gradients, in the state of a parameter. Beside the second key, the sum is
# of gradients already divided: Adafactor of transformers, RMSprop. The last is of LBFGS.
_MOMENTA = {"exp_avg": "exp_avg_sq_row", "momentum_buffer": "square_avg", "prev_flat_grad": ""}


def coupled_rate(optimizer: Optimizer, group: Group, decay: Decay) -> Rate:
    """Return c if ``grad + c * w`` is projected, None if the gradient alone is."""
    rate = _rate(group)
    if "weight_decay" not in group or (decay is None and rate is None):
        return None
    couples = _couples(optimizer, group)
    kind = type(optimizer).__name__
    if decay == "inside" and couples is False:
        raise ValueError(
            f"decay='inside' with where='gradient' needs an optimizer that adds weight_decay * w "
            f"to the gradient, and {kind} shrinks the weights apart; use where='update'"
        )
    if decay is None and couples is None:
        raise ValueError(
            f"does {kind} add weight_decay * w to the gradient? Then say decay='inside', so that "
            "it is projected as well; if it shrinks the weights apart, say decay='outside'"
        )
    is_inside = couples if decay is None else decay == "inside"
    if not is_inside or rate is None:
        return None
    if group.get("maximize"):
        rate = -rate  # the optimizer negates the gradient before it adds decay
    # A GradScaler sets this while a fused optimizer steps on gradients that are still scaled.
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return rate if scale is None else rate * scale


def momentum_has_mean(optimizer: Optimizer, group: Group, decay: Decay) -> bool:
    """Return True if coupled decay stays outside the projection, so that momentum has a mean."""
    is_left_out = decay == "outside" and _couples(optimizer, group) is not False
    return is_left_out and _rate(group) is not None


def shrinkage(optimizer: Optimizer, group: Group, decay: Decay) -> Rate:
    """Return the factor by which decay alone moves the means; None if it is projected too."""
    if decay != "outside":
        return None
    couples, rate, kind = _couples(optimizer, group), _rate(group), type(optimizer).__name__
    if couples:
        raise ValueError(
            f"decay='outside' with where='update' needs an optimizer that shrinks the weights "
            f"apart, and {kind} adds weight_decay * w to the gradient; use where='gradient'"
        )
    if rate is None and "weight_decay" in group:
        return 1.0
    if couples is None or group["lr"] is None:
        raise ValueError(
            f"decay='outside' with where='update' needs to know by how much a step shrinks the "
            f"weights, and {kind} may have a rule of its own; leave decay inside. If each step "
            f"shrinks them by exactly lr * weight_decay, say so in the parameter groups: "
            f"{_DECOUPLES!r}: True"
        )
    lost: float | Tensor = group["lr"] * (rate or 0.0)
    # Set by a GradScaler: unless zero, a fused optimizer leaves the weights where they are.
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return 1 - (lost if found_inf is None else lost * (found_inf == 0))


def _rate(group: Group) -> Rate:
    """Weight decay of a group; None if it is zero."""
    rate: Rate = group.get("weight_decay")
    # A tensor counts as decay whatever is in it: reading it would wait for the device.
    return None if not isinstance(rate, Tensor) and rate == 0 else rate


def _couples(optimizer: Optimizer, group: Group) -> bool | None:
    """Return True if the optimizer adds weight decay to the gradient; None if that is unknown."""
    stepping = inner_optimizer(optimizer)
    # By the step itself: a subclass with a step of its own may decay as it likes.
    known = _COUPLES.get(step_of(type(stepping)))
    if _DECOUPLES in group and (known is not None or not isinstance(stepping, _SET_BY_DEFAULT)):
        return not group[_DECOUPLES]
    return known


def step_of(kind: type[Optimizer]) -> Callable[..., Any]:
    # torch wraps the step of a class when its first instance is made.
    step: Callable[..., Any] = unwrap(kind.step)
    return step


# By step: True if decay is added to the gradient, False if it shrinks the weights by
# lr * weight_decay; the last three of these know no decay.
_COUPLED = "Adadelta Adagrad Adam Adamax ASGD NAdam RAdam RMSprop SGD"
_APART = "Adafactor AdamW Muon LBFGS Rprop SparseAdam"
_COUPLES = {
    step_of(getattr(torch.optim, name)): names is _COUPLED
    for names in (_COUPLED, _APART)
    for name in names.split()
}


def moves_by_gradient_only(optimizer: Optimizer) -> bool:
    """Return True if a step without a closure leaves weights that have no gradient as they are."""
    return step_of(type(inner_optimizer(optimizer))) in _COUPLES


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Find the optimizer that keeps the state: a ZeroRedundancyOptimizer holds one."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer


# Of a second set of weights, which an optimizer keeps in its state and moves in its step: the keys,
# and the part of the way to the new weights. The set begins as 0, or at a part of 1.
Average = tuple[Sequence[str], Callable[[Group, State], float | Tensor]]

# By a part of the name of the class or a base class, and an option in the groups.
_AVERAGES: dict[tuple[str, str], Average] = {
    ("ScheduleFree", "weight_lr_power"): (
        ("x", "y", "z"),
        lambda _, state: 0.0 if "z" in state else 1.0,
    ),
    ("SPlus", "nonstandard_constant"): (("ema",), lambda group, _: 1 - group["ema_rate"]),
    ("ASGD", "lambd"): (("ax",), lambda _, state: state.get("mu", 1.0)),
}


def find_average(optimizer: Optimizer, group: Group) -> Average | None:
    """Find the second set of weights that the optimizer keeps for a group, if any."""
    kinds = " ".join(kind.__name__ for kind in type(inner_optimizer(optimizer)).__mro__)
    found = (a for (kind, option), a in _AVERAGES.items() if kind in kinds and option in group)
    return next(found, None)


def average_means(
    average: Average | None, group: Group, state: State, weight: Weight, mean: Tensor
) -> Means:
    """Find the means of a second set after a step that keeps the mean of the weight."""
    if average is None:
        return {}
    keys, find_part = average
    part, zero = find_part(group, state), torch.zeros_like(mean)
    begin = {key: weight.mean(state[key]) if key in state else zero for key in keys}
    return {key: old + part * (mean - old) for key, old in begin.items()}


@torch.no_grad()
def centralize_momentum(
    optimizer: Optimizer, weights: Iterable[Weight]
) -> tuple[list[str], list[str]]:
    """Centralize momentum that has a mean; list its weights, and those with another form of it."""
    changed, unknown = [], []
    for weight in weights:
        for buffer in _buffers(inner_optimizer(optimizer), weight.parameter):
            try:
                if _has_mean(weight, buffer):
                    weight.subtract_(buffer, weight.mean(buffer))
                    changed.append(weight.name)
            except (NotImplementedError, TypeError):  # such as the 8-bit state in torchao
                unknown.append(weight.name)
    return [*dict.fromkeys(changed)], [*dict.fromkeys(unknown)]


def _buffers(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    if isinstance(optimizer, LBFGS):  # one state, with all parameters in a row
        parameter = optimizer.param_groups[0]["params"][0]
    state: State = optimizer.state.get(parameter, {})
    found = [state.get(key) for key, beside in _MOMENTA.items() if beside not in state]
    return [buffer for buffer in found if isinstance(buffer, Tensor)]


def _has_mean(weight: Weight, buffer: Tensor) -> bool:
    """Return True if the mean over the fan-in is more than rounding; a TypeError without a mean."""
    if buffer.numel() == 0:
        return False
    if buffer.shape != weight.parameter.shape:
        raise TypeError
    _torch.check_dtype(buffer)
    mean = weight.mean(buffer)
    of_mean, of_elements = (torch.finfo(x.dtype).eps for x in (mean, buffer))
    shape, axes = weight.fan_in
    rounding = of_mean + of_elements / sqrt(prod([shape[axis] for axis in axes]))
    return bool(mean.abs().max() > 16 * rounding * buffer.abs().max())
