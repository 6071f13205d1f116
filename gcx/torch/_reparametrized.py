"""Parameters from which a weight is computed: by parametrizations, or by hooks of older torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Parametrizations whose original has its fan-in where the weight has it.
_KEEP_FAN_IN = (_WeightNorm, _SpectralNorm, _Orthogonal)
_LENGTH = "weight_norm g: the length of a weight"


class Owned(NamedTuple):
    """A parameter of a model, and the layer that uses it."""

    name: str
    parameter: Tensor
    holder: nn.Module  # where it is registered, as `key`
    key: str
    owner: nn.Module  # the layer whose rule is asked, about `weight`
    weight: str
    objection: str = ""  # to its having the fan-in of that weight


def owned_parameters(model: nn.Module) -> Iterator[Owned]:
    """List the parameters of a model with their owners, tied ones with each of them."""
    # Not model.named_parameters(), which hides the second owner.
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{key}" if path else key
            if isinstance(module, ParametrizationList):
                # At OWNER.parametrizations.TENSOR; OWNER is empty for the model itself.
                owner_path, _, tensor = path.rpartition("parametrizations.")
                owner = model.get_submodule(owner_path.removesuffix("."))
                objection = _objection(module, parameter)
                yield Owned(name, parameter, module, key, owner, tensor, objection)
            else:
                weight, objection = _by_hook(module, key)
                yield Owned(name, parameter, module, key, module, weight, objection)


def _objection(parametrization: ParametrizationList, original: Tensor) -> str:
    if isinstance(parametrization[0], _WeightNorm) and original is parametrization.original0:
        return _LENGTH
    if all(isinstance(step, _KEEP_FAN_IN) for step in parametrization):
        return ""
    kinds = ", ".join(type(step).__name__ for step in parametrization)
    return f"unknown: nobody declared the parametrization by {kinds}"


def _by_hook(layer: nn.Module, key: str) -> tuple[str, str]:
    """Name of the weight that a parameter is the origin of, and the objection, if a hook did it."""
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
