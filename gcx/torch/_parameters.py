"""Parameters of a model, each with the layer that uses it: not always the layer that holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Parametrizations whose original has its fan-in where the weight has it.
_KEEP_FAN_IN = (_WeightNorm, _SpectralNorm)
_LENGTH = "weight_norm g: the length of a weight"
_COORDINATES = "orthogonal: coordinates of a rotation"
# Modules that hold parameters for the module around them.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


class User(NamedTuple):
    """A module that may use a parameter, and the path to it from there."""

    module: nn.Module
    name: str


class Owned(NamedTuple):
    """A parameter of a model, and the layer that uses it."""

    name: str
    parameter: Tensor
    holder: nn.Module  # where it is registered, as `key`
    key: str
    users: tuple[User, ...]  # the layer comes last, after the modules that hold it
    objection: str = ""  # why it has not the fan-in of the weight of that layer

    @property
    def layer(self) -> nn.Module:
        """The innermost module that uses the parameter."""
        return self.users[-1].module


def owned_parameters(model: nn.Module) -> Iterator[Owned]:
    """List the parameters of a model with their layers, by each of their names."""
    # Not model.named_parameters(), which hides the second owner of a tied parameter.
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            weight, objection = _weight_of(path, module, key)
            name = _join(path, key)
            users = _users(modules, weight)
            yield Owned(name, parameter, module, key, users, objection)


def _users(modules: Mapping[str, nn.Module], weight: str) -> tuple[User, ...]:
    steps = weight.split(".")
    users = [
        User(modules[".".join(steps[:depth])], ".".join(steps[depth:]))
        for depth in range(len(steps))
    ]
    return tuple([u for u in users if not isinstance(u.module, _CONTAINERS)] or users)


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
        return _COORDINATES
    if all(isinstance(step, _KEEP_FAN_IN) for step in parametrization):
        return ""
    kinds = ", ".join(type(step).__name__ for step in parametrization)
    return f"unknown: nobody declared the parametrization by {kinds}"


def _by_hook(layer: nn.Module, key: str) -> tuple[str, str]:
    """Name of the weight that a hook makes from a parameter, and the objection if there is one."""
    for hook in vars(layer)["_forward_pre_hooks"].values():
        if isinstance(hook, WeightNorm) and key in (f"{hook.name}_g", f"{hook.name}_v"):
            return hook.name, _LENGTH if key.endswith("_g") else ""
        if isinstance(hook, SpectralNorm) and key == f"{hook.name}_orig":
            return hook.name, ""
        if isinstance(hook, prune.BasePruningMethod) and key == f"{_pruned(hook)}_orig":
            return _pruned(hook), ""
    return key, ""


def _pruned(hook: prune.BasePruningMethod) -> str:
    name: str = vars(hook)["_tensor_name"]
    return name


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def check_has_shape(owned: Owned) -> None:
    """Raise a RuntimeError if a parameter is lazy, or a flat buffer."""
    if is_lazy(owned.parameter):
        msg = (
            f"{owned.name} has no shape yet: it belongs to a lazy layer; run one forward pass of "
            "the model first"
        )
        raise RuntimeError(msg)
    if getattr(owned.parameter, "_is_flat_param", False):
        raise RuntimeError(flattened(owned.name, "a flat buffer of several parameters"))


def flattened(name: str, what: str) -> str:
    """Say that a parameter has lost the shape of its layer, and name the remedy."""
    return (
        f"{name} is {what}: the shapes of the layers are gone, as FSDP1 and DeepSpeed do it, so "
        "there is no fan-in to average over. Shard with torch.distributed.fsdp.fully_shard, which "
        "keeps them, or call gcx.torch.centralize_in_backward(model) before the model is wrapped"
    )
