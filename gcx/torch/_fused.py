"""AdamW and SGD with Gradient Centralization in their step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gcx._options import Layers, Options
from gcx.plan import Plan
from gcx.torch._fused_step import CentralizationInStep
from gcx.torch._plan import Overrides
from gcx.torch._step import not_compiled

_NO_MODEL = (
    "parameters do not say where their fan-in is, but the layers of a model do: give the model "
    "instead of the parameters, or as model= beside the parameters or their groups"
)


class FusedOptimizer(Optimizer):
    """Mixin for a torch optimizer: kernels step first, and torch steps the rest."""

    def __init__(
        self,
        params: ParamsT | nn.Module,
        *of_torch: Any,
        model: nn.Module | None,
        options: Options,
        **switches: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            model = params if model is None else model
            params = params.parameters()
        if model is None:
            raise TypeError(_NO_MODEL)
        super().__init__(params, *of_torch, **switches)
        self._centralization = CentralizationInStep(self, model, options)
        del vars(self._centralization)["_optimizer"]  # no cycle
        del vars(self)["__reduce_ex__"]  # copies need no warning
        registries = [name for name in vars(self) if name.endswith("_hooks")]
        self._own_hooks = {name: OrderedDict(vars(self)[name]) for name in registries}

    @property
    def plan(self) -> Plan:
        """The decision on each parameter, as a `gcx.plan.Plan`."""
        return self._centralization.plan

    @property
    def fallbacks(self) -> list[str]:
        """For each group, why torch steps some of its parameters; empty if kernels step all."""
        return [self._centralization.hooks.fallback(group) for group in self.param_groups]

    def centralize_grads_(self) -> None:
        """Call `gcx.torch.centralize_grads_` by the plan of this optimizer, for example to clip."""
        self._centralization.centralize_grads_()

    def __repr__(self) -> str:
        options = super().__repr__().removesuffix(")")
        lines = ["Gradient Centralization", f"    plan: {self.plan!r}"]
        for k, reason in enumerate(self.fallbacks):
            way = f"by torch ({reason})" if reason else "in one launch for each kernel and dtype"
            lines.append(f"    step of group {k}: {way}")
        return options + "\n".join(lines) + "\n)"

    def __getstate__(self) -> dict[str, Any]:
        # Copies of an optimizer lose its hooks; they have to keep these.
        hooks = {name: OrderedDict(own) for name, own in self._own_hooks.items()}
        own = {"_centralization": self._centralization, "_own_hooks": self._own_hooks}
        return {**super().__getstate__(), **own, **hooks}

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """Step by kernels, and collect the parameters of a group that are left.

        Torch calls this with lists to fill, and makes the state of new parameters here.
        """
        collect = super()._init_group  # type: ignore[misc]

        def remember(parameters: list[Tensor]) -> None:
            apart = ([] if isinstance(each, list) else each for each in lists)
            collect({**group, "params": parameters}, *apart)

        left = self._centralization.hooks.step(group, remember)
        return collect({**group, "params": left}, *lists)


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """AdamW with Gradient Centralization: kernels step first on CUDA, and torch steps the rest.

    Experimental until measured on a GPU. It is `torch.optim.AdamW` with the centralized gradient in
    place of the gradient; weight decay is apart. Checkpoints are the same. See :doc:`/fused`.

    Parameters
    ----------
    params : torch.nn.Module or iterable
        A model; or, together with `model`, parameters or parameter groups as torch takes them. A
        group with ``"centralize": False`` is left alone.
    lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused
        As in `torch.optim.AdamW`.
    model : torch.nn.Module, optional
        The model that holds every parameter; needed if `params` is not a model.
    strength, layers, overrides, reproducible
        As in `centralize`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `centralize` and `torch.optim.AdamW`; if parameters are given without a model.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    >>> gcx.torch.AdamW(groups, lr=1e-3, model=model).fallbacks
    ['no parameter on a CUDA device', 'no parameter on a CUDA device']
    """

    # torch.compile would not know the kernels.
    step: Callable[..., Any] = not_compiled(torch.optim.AdamW.step)

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        model: nn.Module | None = None,
        strength: float = 1.0,
        layers: Layers = "all",
        overrides: Overrides | None = None,
        reproducible: bool = False,
    ) -> None:
        options = Options(
            strength=strength, layers=layers, overrides=overrides, reproducible=reproducible
        )
        switches = {"maximize": maximize, "foreach": foreach, "capturable": capturable}
        switches |= {"differentiable": differentiable, "fused": fused}
        of_torch = lr, betas, eps, weight_decay, amsgrad
        super().__init__(params, *of_torch, model=model, options=options, **switches)


class SGD(FusedOptimizer, torch.optim.SGD):
    """SGD with Gradient Centralization: kernels step first on CUDA, and torch steps the rest.

    Experimental until measured on a GPU. It is `torch.optim.SGD` with the sum of gradient and
    weight decay centralized, so that each weight keeps its mean over the fan-in (corollary 4.1).

    Parameters
    ----------
    params, model, strength, layers, overrides, reproducible
        As in `AdamW`.
    lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused
        As in `torch.optim.SGD`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `AdamW`.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = gcx.torch.SGD(model, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    >>> start = model.weight.mean(1).detach()
    >>> model(torch.rand(8, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> torch.allclose(model.weight.mean(1), start, atol=1e-6)
    True
    """

    step: Callable[..., Any] = not_compiled(torch.optim.SGD.step)

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        model: nn.Module | None = None,
        strength: float = 1.0,
        layers: Layers = "all",
        overrides: Overrides | None = None,
        reproducible: bool = False,
    ) -> None:
        options = Options(
            strength=strength, layers=layers, overrides=overrides, reproducible=reproducible
        )
        switches = {"maximize": maximize, "foreach": foreach}
        switches |= {"differentiable": differentiable, "fused": fused}
        of_torch = lr, momentum, dampening, weight_decay, nesterov
        super().__init__(params, *of_torch, model=model, options=options, **switches)
