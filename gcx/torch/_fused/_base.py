"""What `gcx.torch.AdamW` and `gcx.torch.SGD` have in common, beside what they have from torch."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gcx.plan import Plan
from gcx.torch._fused._hooks import CentralizationInStep
from gcx.torch._fused._rules import Rule
from gcx.torch._plan import Layers, Overrides

# The registries of hooks in which `CentralizationInStep` has some.
_REGISTRIES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class FusedOptimizer(Optimizer):
    """What comes before an optimizer of torch, whose step is for what the kernels leave to it."""

    def _centralize(
        self,
        rule: Rule,
        model: nn.Module,
        *,
        layers: Layers,
        overrides: Overrides | None,
        reproducible: bool,
    ) -> None:
        self._centralization = CentralizationInStep(
            self, model, rule, layers=layers, overrides=overrides, reproducible=reproducible
        )
        self._own_hooks = {name: OrderedDict(vars(self)[name]) for name in _REGISTRIES}

    @property
    def plan(self) -> Plan:
        """What happens to each parameter, and why, as a `gcx.plan.Plan`."""
        return self._centralization.plan

    @property
    def fallbacks(self) -> list[str]:
        """For each parameter group, why torch will make its next step, or that of some parameters.

        An empty text for a group that is centralized and updated in one launch for each dtype.
        """
        return [self._centralization.in_step.fallback(group) for group in self.param_groups]

    def centralize_grads_(self) -> None:
        """Centralize the gradients now, in place, such as to clip what is left of them.

        As `gcx.torch.centralize_grads_` by the plan of this optimizer. The step does it again,
        which changes nothing.

        Raises
        ------
        TypeError, RuntimeError
            As a step would.
        ValueError
            If there is no gradient to centralize.
        """
        self._centralization.centralize_grads_()

    def __repr__(self) -> str:
        options = super().__repr__().removesuffix(")")
        lines = ["Gradient Centralization", f"    plan: {self.plan!r}"]
        for k, reason in enumerate(self.fallbacks):
            way = f"by torch ({reason})" if reason else "in one launch for each dtype"
            lines.append(f"    step of group {k}: {way}")
        return options + "\n".join(lines) + "\n)"

    def __getstate__(self) -> dict[str, Any]:
        # Copies of an optimizer leave its hooks behind; these are what makes it what it is.
        hooks = {name: OrderedDict(own) for name, own in self._own_hooks.items()}
        own = {"_centralization": self._centralization, "_own_hooks": self._own_hooks}
        return {**super().__getstate__(), **own, **hooks}

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """Collect what torch is to update in a group: what our own part of the step leaves.

        Torch calls this with lists to be filled, and makes the state of new parameters here.
        """
        collect = super()._init_group  # type: ignore[misc]

        def remember(parameters: list[Tensor]) -> None:
            apart = ([] if isinstance(each, list) else each for each in lists)
            collect({**group, "params": parameters}, *apart)

        left = self._centralization.in_step.step(group, remember)
        return collect({**group, "params": left}, *lists)


def parameters_of(params: ParamsT | nn.Module) -> ParamsT:
    """List what is to be optimized: a model stands for its parameters."""
    return params.parameters() if isinstance(params, nn.Module) else params


def model_of(params: ParamsT | nn.Module, model: nn.Module | None) -> nn.Module:
    """Find the model that says where the fan-in of its weights is; a TypeError if there is none."""
    if model is not None:
        return model
    if isinstance(params, nn.Module):
        return params
    msg = (
        "parameters do not say where their fan-in is, but the layers of a model do: give the model "
        "instead of the parameters, or as model= beside the parameters or their groups"
    )
    raise TypeError(msg)
