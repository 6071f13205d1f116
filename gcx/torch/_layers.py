"""Layers, their parameters, and the rules of torch.nn: the fan-in of each, or why it has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gcx._names import is_glob
from gcx._rules import BIAS, EMBEDDING, NORM, SLOPE, Register, Rule, Rules, ask
from gcx.layout import Layout
from gcx.plan import LeaveAlone
from gcx.torch._packages import PACKAGES, Answer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# By rank: a weight of another rank was flattened by a wrapper, or is read in another way.
_RANK_2, _RANK_3, _RANK_4, _RANK_5 = ({rank: Layout("o...")} for rank in (2, 3, 4, 5))
_NORM, _EMBEDDING = {"weight": NORM, "bias": BIAS}, {"weight": EMBEDDING}
_RECURRENT: Mapping[str, Answer] = {"weight_*": _RANK_2, "bias_*": BIAS}


def _transposed_convolution(layer: Any) -> Mapping[str, Answer]:
    # (in, out / groups, kernel...): an output of a group sees the inputs of that group alone.
    groups = layer.groups
    layout = Layout("io...") if groups == 1 else Layout("(bi)o...", b=groups)
    return {"weight": {2 + len(layer.kernel_size): layout}, "bias": BIAS}


TORCH_NN: Mapping[type[nn.Module], Rule[Answer]] = {
    nn.Linear: {"weight": _RANK_2, "bias": BIAS},
    nn.Bilinear: {"weight": _RANK_3, "bias": BIAS},
    nn.MultiheadAttention: {
        "*_proj_weight": _RANK_2,
        "*_proj_bias": BIAS,
        "bias_[kv]": LeaveAlone("token: appended to the keys and values"),
    },
    nn.PReLU: {"weight": SLOPE},
    # (out, in / groups, kernel...): an output of a group sees its inputs alone.
    nn.Conv1d: {"weight": _RANK_3, "bias": BIAS},
    nn.Conv2d: {"weight": _RANK_4, "bias": BIAS},
    nn.Conv3d: {"weight": _RANK_5, "bias": BIAS},
    **dict.fromkeys(TRANSPOSED, _transposed_convolution),
    **dict.fromkeys((nn.RNNBase, nn.RNN, nn.LSTM, nn.GRU), _RECURRENT),
    **dict.fromkeys((nn.RNNCellBase, nn.RNNCell, nn.LSTMCell, nn.GRUCell), _RECURRENT),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), _EMBEDDING),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _NORM),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), _NORM),
}


class _TorchRules(Rules[Answer]):
    def checked(self, rule: Rule[Any], kind: Any) -> Rule[Any]:
        """Let a rule raise a ValueError if it names something that its layer does not have."""
        return partial(_ask_checked, rule, kind.__name__)


RULES = _TorchRules({**TORCH_NN, **PACKAGES}, group="gcx.torch.layers")
register_layer: Register = RULES.register


def _ask_checked(rule: Rule[Any], kind: str, layer: nn.Module) -> Mapping[str, Any]:
    answers = ask(rule, layer, kind)
    # hasattr() would compute parametrized weights, and dir() leaves out names of digits.
    children, parameters = layer.named_children(), layer.named_parameters(recurse=False)
    known = {*dir(layer), *dict(children), *dict(parameters)}
    for key in answers:
        if not is_glob(key) and key.partition(".")[0] not in known:
            raise ValueError(
                f"the rule of {kind} speaks of {key!r}, which this {type(layer).__name__} does not "
                "have; a name that only some of the layers have can be a glob"
            )
    return answers


# Parametrizations whose original has its fan-in where the weight has it.
_KEEP_FAN_IN = (_WeightNorm, _SpectralNorm)
_UNITS_TRIED = 4
_LENGTH = "weight_norm g: the length of a weight"
# Modules that hold parameters for the module around them.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


class Owned(NamedTuple):
    """A parameter of a model, and the layer that uses it."""

    name: str
    parameter: Tensor
    holder: nn.Module  # where it is registered, as `key`
    key: str
    # The modules that may use it, each with the path from there; the layer comes last.
    users: tuple[tuple[nn.Module, str], ...]
    objection: str = ""  # why it has not the fan-in of the weight of that layer

    @property
    def layer(self) -> nn.Module:
        """The innermost module that uses the parameter."""
        return self.users[-1][0]

    def keeps_units(self, layout: Layout) -> bool:
        """Return True if a parametrization makes each unit of a weight from the same unit.

        Autograd tells, unless the parametrization joins several parameters.
        """
        made_by, shape = self.holder, tuple(self.parameter.shape)
        is_alone = isinstance(made_by, ParametrizationList) and self.key == "original"
        if not is_alone or self.parameter.is_meta:
            return False
        numbers = torch.linspace(0.5, 1.5, self.parameter.numel()).reshape(shape)
        original = numbers.to(self.parameter).requires_grad_()
        with torch.enable_grad():
            weight = torch.func.functional_call(made_by, {self.key: original}, ())
        if weight.shape != shape or not weight.requires_grad:
            return False
        view, axes = layout.split(shape)
        units = (weight * numbers.to(weight)).reshape(view).sum(axes).flatten()
        for k, unit in enumerate(units[:_UNITS_TRIED]):
            (grad,) = torch.autograd.grad(unit, original, retain_graph=True)
            if (grad.reshape(view) != 0).any(axes).flatten().nonzero().tolist() != [[k]]:
                return False
        return True


def owned_parameters(model: nn.Module) -> Iterator[Owned]:
    """List the parameters of a model with their layers, by each of their names.

    Raises a RuntimeError if a parameter is lazy, or a flat buffer.
    """
    # Not model.named_parameters(), which hides the second owner of a tied parameter.
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            weight, objection = _weight_of(path, module, key)
            name = _join(path, key)
            if is_lazy(parameter):
                raise RuntimeError(
                    f"{name} has no shape yet: it is of a lazy layer; run one forward pass first"
                )
            if getattr(parameter, "_is_flat_param", False):
                raise RuntimeError(flattened(name, "a flat buffer of several parameters"))
            yield Owned(name, parameter, module, key, _users(modules, weight), objection)


def _users(modules: Mapping[str, nn.Module], weight: str) -> tuple[tuple[nn.Module, str], ...]:
    steps = weight.split(".")
    users = [(modules[".".join(steps[:k])], ".".join(steps[k:])) for k in range(len(steps))]
    return tuple([user for user in users if not isinstance(user[0], _CONTAINERS)] or users)


def _weight_of(path: str, module: nn.Module, key: str) -> tuple[str, str]:
    """Path of the weight that is or comes from a parameter, and the objection if there is one."""
    if isinstance(module, ParametrizationList):
        # At LAYER.parametrizations.WEIGHT; LAYER is empty for the model itself.
        layer, found, weight = path.rpartition("parametrizations.")
        if found:
            return layer + weight, _objection(module, module.get_parameter(key))
    weight, objection = _by_hook(module, key)
    return _join(path, weight), objection


def _objection(parametrization: ParametrizationList, original: Tensor) -> str:
    if isinstance(parametrization[0], _WeightNorm) and original is parametrization.original0:
        return _LENGTH
    if any(isinstance(step, _Orthogonal) for step in parametrization):
        return "orthogonal: coordinates of a rotation"
    if all(isinstance(step, _KEEP_FAN_IN) for step in parametrization):
        return ""
    kinds = ", ".join(type(step).__name__ for step in parametrization)
    return f"unknown: a parametrization by {kinds}"


def _by_hook(layer: nn.Module, key: str) -> tuple[str, str]:
    """Name of the weight that a hook makes from a parameter, and the objection if there is one."""
    weight, _, part = key.rpartition("_")
    for hook in vars(layer)["_forward_pre_hooks"].values():
        if isinstance(hook, (WeightNorm, SpectralNorm, prune.BasePruningMethod)):
            made = vars(hook).get("name") or vars(hook)["_tensor_name"]
            if weight == made and part in ("g", "v", "orig"):
                return weight, _LENGTH if part == "g" else ""
    return key, ""


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def flattened(name: str, what: str) -> str:
    """Say that a parameter has lost the shape of its layer, and name the remedy."""
    return (
        f"{name} is {what}: the shapes of the layers are gone, as FSDP1 and DeepSpeed do it, so "
        "there is no fan-in to average over. Shard with torch.distributed.fsdp.fully_shard, which "
        "keeps them, or call gcx.torch.centralize_in_backward(model) before the model is wrapped"
    )
