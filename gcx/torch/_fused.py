"""AdamW and SGD that centralize in their step: by kernels on CUDA, and by torch elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from ctypes import c_float
from inspect import Signature, signature
from math import sqrt
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn, zeros_like
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gcx._options import Layers, Options
from gcx.backends import _torch_cuda as kernels
from gcx.backends._torch import is_for_kernels
from gcx.backends._torch_dtensor import see_all
from gcx.plan import Plan
from gcx.torch._centralize import GradientCentralization
from gcx.torch._optimizer import State, coupled_rate, step_of
from gcx.torch._plan import Overrides
from gcx.torch._step import GradientHooks, not_compiled
from gcx.torch._weights import Group, Weight, centralize_, with_gradient

# With other values of these, torch makes the step.
_OF_TORCH: Mapping[str, object] = {"differentiable": False, "foreach": None, "fused": None}

# The name of a rule in kernels.cu; the strength, the rate and the numbers of this rule.
_Numbers = tuple[str, Sequence[float]]


class FusedOptimizer(Optimizer):
    """Mixin for a torch optimizer: kernels step first, and torch steps the rest."""

    _kind: ClassVar[type[Optimizer]]
    _fixed: ClassVar[Mapping[str, object]]  # options that must have these values
    _scalars: ClassVar[Sequence[str]]  # options that must not be tensors
    _memory: ClassVar[Sequence[str]]  # keys of the state that the kernels update
    # How far a parameter is: one stage, one launch. None: left to torch.
    _find_stage: ClassVar[Callable[..., Any]]
    _find_numbers: ClassVar[Callable[..., _Numbers]]

    def __init__(
        self,
        params: ParamsT | nn.Module,
        *args: Any,
        model: nn.Module | None = None,
        strength: float = 1.0,
        layers: Layers = "all",
        overrides: Overrides | None = None,
        reproducible: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            model = params if model is None else model
            params = params.parameters()
        if model is None:
            raise TypeError(
                "parameters do not say where their fan-in is, but the layers of a model do: give "
                "the model instead, or as model= beside the parameters or their groups"
            )
        self._options = Options("gradient", None, strength, layers, overrides, reproducible)
        super().__init__(params, *args, **kwargs)
        self._centralization = _CentralizationInStep(self, model, self._options)
        del vars(self._centralization)["_optimizer"]  # no cycle
        del vars(self)["__reduce_ex__"]  # copies need no warning
        self._own_hooks = {k: OrderedDict(v) for k, v in vars(self).items() if k.endswith("_hooks")}

    @property
    def plan(self) -> Plan:
        """The decision on each parameter, as a `gcx.plan.Plan`."""
        return self._centralization.plan

    @property
    def fallbacks(self) -> list[str]:
        """For each group, why torch steps some of its parameters; empty if kernels step all."""
        return [self._find_fallback(group) for group in self.param_groups]

    def centralize_grads_(self) -> None:
        """Call `gcx.torch.centralize_grads_` by the plan of this optimizer, for example to clip."""
        self._centralization.centralize_grads_()

    def __repr__(self) -> str:
        options = super().__repr__().removesuffix(")")
        lines = ["Gradient Centralization", f"    plan: {self.plan!r}"]
        for k, why in enumerate(self.fallbacks):
            way = f"by torch ({why})" if why else "in one launch for each kernel and dtype"
            lines.append(f"    step of group {k}: {way}")
        return options + "\n".join(lines) + "\n)"

    def __getstate__(self) -> dict[str, Any]:
        # Copies of an optimizer lose its hooks; they have to keep these.
        hooks = {name: OrderedDict(own) for name, own in self._own_hooks.items()}
        own = {name: vars(self)[name] for name in ("_centralization", "_options", "_own_hooks")}
        return {**super().__getstate__(), **own, **hooks}

    def _init_group(self, group: Group, *lists: Any) -> Any:
        """Step by kernels, and collect the parameters of a group that are left.

        Torch calls this with lists to fill, and makes the state of new parameters here.
        """
        collect = super()._init_group  # type: ignore[misc]
        marked = self._centralization.hooks.marked.pop(id(group), None)
        if marked is None:  # the hooks have centralized it, or there are none in this step
            return collect(group, *lists)
        parameters = [p for p in group["params"] if p.grad is not None]
        if not all(map(self.state.get, parameters)):
            collect(group, *([] if isinstance(each, list) else each for each in lists))
        by_stage: dict[Hashable, list[Tensor]] = {}
        for p in parameters:
            stage = self._find_stage(group, self.state.get(p, {}))
            by_stage.setdefault(stage, []).append(p)
        left = by_stage.pop(None, [])
        for stage, members in by_stage.items():
            left += self._step_of_stage(group, stage, members, marked)
        if left:
            found = with_gradient([marked[p] for p in left if p in marked])
            centralize_(*found, coupled_rate(self, group, None), 1.0)
        return collect({**group, "params": left}, *lists)

    def _step_of_stage(
        self, group: Group, stage: Any, parameters: list[Tensor], marked: dict[Tensor, Weight]
    ) -> list[Tensor]:
        """Make the step of parameters that are equally far; return those that are left."""
        if kernels.is_traced():
            return parameters
        memory, roles, axes = self._list_roles(group, parameters, marked)
        rule, numbers = self._find_numbers(group, stage)
        launches = kernels.find_launches(rule, roles, axes, self._options.reproducible)
        done = [k for k, found in enumerate(launches.run(roles, numbers)) if found is not None]
        increment_version([x[k] for x in (parameters, *memory.values()) for k in done])
        for key, tensors in memory.items():
            for k in done:
                self.state[parameters[k]][key] = tensors[k]
        if done and "exp_avg" in memory:
            one = torch.tensor(1.0, device="cpu")  # torch would make a tensor of a number for each
            torch._foreach_add_([self.state[parameters[k]]["step"] for k in done], one, alpha=1.0)
        return [parameters[k] for k in sorted({*range(len(parameters))}.difference(done))]

    def _list_roles(
        self, group: Group, parameters: list[Tensor], weights: Mapping[Tensor, Weight]
    ) -> tuple[dict[str, list[Tensor]], list[list[Tensor]], list[tuple[int, ...]]]:
        """List the state by key, all that the kernels get, and axes; make what is missing."""
        grads = [p if p.grad is None else p.grad for p in parameters]
        pairs = [(self.state.get(p, {}), g) for p, g in zip(parameters, grads, strict=True)]
        memory = {
            key: [zeros_like(g) if s.get(key) is None else s[key] for s, g in pairs]
            for key in (() if group.get("momentum") == 0 else self._memory)
        }
        fan_ins = [weights[p].fan_in if p in weights else (p.shape, ()) for p in parameters]
        roles = [see_all(each, fan_ins, grads) for each in (grads, parameters, *memory.values())]
        return memory, roles, [axes for _, axes in fan_ins]

    @torch.no_grad()
    def _find_fallback(self, group: Group) -> str:
        """Say why torch will step some parameters of a group; empty if the kernels step all."""
        if reason := self._why_not(group):
            return reason
        try:
            weights = {w.parameter: w for w in self._centralization.weights()}
        except RuntimeError as error:  # a step would raise it
            return str(error)
        for parameter in [p for p in group["params"] if p.requires_grad]:
            state = self.state.get(parameter, {})
            if state and self._find_stage(group, state) is None:
                return "the state is from another optimizer, or the steps are counted on the GPU"
            _, roles, (axes,) = self._list_roles(group, [parameter], weights)
            grad, *beside = [x for (x,) in roles]
            if not kernels.see(grad, axes, *beside):
                return (
                    f"the kernels do not take a {type(grad).__name__} of {grad.dtype} and shape "
                    f"{tuple(grad.shape)} with strides {grad.stride()} on {grad.device}, or its "
                    "parameter or state has another dtype, shape or strides"
                )
        return ""

    def _why_not(self, group: Group) -> str:
        """Say why the kernels step no parameter of a group; empty if they may step some."""
        if step_of(type(self)) is not step_of(self._kind):
            return f"{type(self).__name__} has a step of its own"
        if len(vars(self)["_optimizer_step_pre_hooks"]) > 1:
            return "other hooks before the step may use the gradients"
        if self._options.strength != 1.0:
            return f"strength is {self._options.strength}"
        for attribute in ("grad_scale", "found_inf"):  # set by a GradScaler
            if getattr(self, attribute, None) is not None:
                return f"{attribute} is set"
        for option, value in self._fixed.items():
            if group[option] != value:
                return f"{option}={group[option]!r}"
        for option in self._scalars:
            values = group[option] if isinstance(group[option], tuple) else (group[option],)
            if any(isinstance(value, Tensor) for value in values):
                return f"{option} is a tensor"
        # Asked only if there is a parameter on CUDA: the answer makes a CUDA context.
        device = next((p.device for p in group["params"] if is_for_kernels(p)), None)
        return "no parameter on a CUDA device" if device is None else kernels.why_not(device)


class _StepHooks(GradientHooks):
    """Hooks that skip the parameter groups that the kernels centralize in the step."""

    def __init__(self, *args: Any) -> None:
        self.marked: dict[int, dict[Tensor, Weight]] = {}  # by the id of the group
        super().__init__(*args)

    def _by_group(self) -> list[tuple[Group, list[Weight]]]:
        weights = {id(group): found for group, found in super()._by_group()}
        self.marked.clear()
        left = []
        optimizer = cast("FusedOptimizer", self._targets.get_optimizer())
        for group in optimizer.param_groups:
            found = weights.get(id(group), [])
            if not optimizer._why_not(group):  # noqa: SLF001
                self.marked[id(group)] = {w.parameter: w for w in with_gradient(found)[0]}
            elif found:
                left.append((group, found))
        return left


class _CentralizationInStep(GradientCentralization):
    def _make_hooks(self) -> _StepHooks:
        self.hooks, self.weights = _StepHooks(self._targets, self._options), self._targets.weights
        return self.hooks


def _sign_as(kind: type[Optimizer]) -> Signature:
    """Let help() show torch's arguments, and then gcx's own."""
    own = [p for p in signature(FusedOptimizer).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return Signature([*signature(kind).parameters.values(), *own])


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """AdamW with Gradient Centralization: kernels step first on CUDA, and torch steps the rest.

    Experimental until measured on a GPU. It is `torch.optim.AdamW` with the gradient centralized;
    weight decay is apart. Checkpoints are the same. See :doc:`/fused`.

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
        As in `centralize`; so are the errors.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    >>> gcx.torch.AdamW(groups, lr=1e-3, model=model).fallbacks
    ['no parameter on a CUDA device', 'no parameter on a CUDA device']
    """

    __signature__: Signature = _sign_as(torch.optim.AdamW)
    # torch.compile would not know the kernels.
    step: Callable[..., Any] = not_compiled(torch.optim.AdamW.step)
    _kind = torch.optim.AdamW
    _fixed: ClassVar = {"amsgrad": False, "capturable": False, **_OF_TORCH}
    _scalars = ("lr", "betas", "weight_decay", "eps")
    _memory = ("exp_avg", "exp_avg_sq")

    @staticmethod
    def _find_stage(_: Group, state: State) -> tuple[float, bool] | None:
        # The state may be of another optimizer. Reading steps from a GPU would wait for it.
        if not (state.keys() >= {"step", "exp_avg", "exp_avg_sq"} and state["step"].is_cpu):
            return None
        return state["step"].item(), state["exp_avg"].dtype is torch.float64

    @staticmethod
    def _find_numbers(group: Group, stage: tuple[float, bool]) -> _Numbers:
        steps, is_double = stage
        # As in torch's fused step on CUDA.
        rounded = float if is_double else lambda number: c_float(number).value
        lr, decay = rounded(group["lr"]), rounded(group["weight_decay"])
        beta1, beta2 = map(rounded, group["betas"])
        correction1, correction2 = (rounded(1 - rounded(b ** (steps + 1))) for b in (beta1, beta2))
        moments = beta1, beta2, rounded(lr / correction1), rounded(sqrt(correction2))
        sign = -1.0 if group["maximize"] else 1.0
        return "AdamW", (1.0, 0.0, sign, rounded(lr * decay), *moments, group["eps"])


class SGD(FusedOptimizer, torch.optim.SGD):
    """SGD with Gradient Centralization: kernels step first on CUDA, and torch steps the rest.

    Experimental until measured on a GPU. It is `torch.optim.SGD` with the sum of gradient and
    weight decay centralized, so that each weight keeps its mean over the fan-in (corollary 4.1).

    Parameters
    ----------
    params, model, strength, layers, overrides, reproducible
        As in `AdamW`, and the same errors.
    lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused
        As in `torch.optim.SGD`.

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

    __signature__: Signature = _sign_as(torch.optim.SGD)
    step: Callable[..., Any] = not_compiled(torch.optim.SGD.step)
    _kind = torch.optim.SGD
    _fixed = _OF_TORCH
    _scalars = ("lr", "momentum", "dampening", "weight_decay")
    _memory = ("momentum_buffer",)

    @staticmethod
    def _find_stage(group: Group, state: State) -> bool:
        return group["momentum"] != 0 and state.get("momentum_buffer") is None

    @staticmethod
    def _find_numbers(group: Group, stage: bool) -> _Numbers:
        lr, momentum, dampening, decay = (group[name] for name in SGD._scalars)
        sign = -1.0 if group["maximize"] else 1.0
        name = "Sgd" + "Momentum" * (momentum != 0) + "Rate" * (decay != 0)
        of_momentum = momentum, 1 - dampening, stage, group["nesterov"]
        return name, (1.0, sign * decay, sign, -lr, *of_momentum)
