"""AdamW and SGD with Gradient Centralization in their step, in one launch where kernels run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from gcx.torch._calls import not_compiled
from gcx.torch._fused._base import FusedOptimizer, model_of, parameters_of
from gcx.torch._fused._rules import AdamWRule, SGDRule
from gcx.torch._plan import Layers, Overrides


class AdamW(FusedOptimizer, torch.optim.AdamW):
    r"""AdamW with Gradient Centralization: in one launch on CUDA, where it costs next to nothing.

    It does what `torch.optim.AdamW` does with `gcx.torch.centralize`, is used as that is, and its
    checkpoints are those of `torch.optim.AdamW`.

    Parameters
    ----------
    params : torch.nn.Module or iterable
        A model, which stands for all of its parameters; or parameters, pairs of name and parameter,
        or parameter groups, beside `model`. A group with ``"centralize": False`` is left alone, as
        with `centralize`.
    lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused
        As in `torch.optim.AdamW`.
    model : torch.nn.Module, optional
        The model, whose layers say where the fan-in of their weights is. Needed if `params` is not
        a model; it must hold every parameter.
    layers, overrides, reproducible
        As in `centralize`.

    Attributes
    ----------
    plan : gcx.plan.Plan
        What happens to each parameter, and why.
    fallbacks : list of str
        For each parameter group, why torch will make its next step, or that of some parameters; an
        empty text if nothing is left to torch. `repr` shows it too.

    Raises
    ------
    TypeError
        If parameters are given without a model; else as `centralize` and `torch.optim.AdamW`.
    ValueError, RuntimeError
        As `centralize` and `torch.optim.AdamW`.

    Warns
    -----
    UserWarning
        As `centralize`: if momentum of a checkpoint carries a mean, or a checkpoint switches
        everything off. Copies do not warn; they centralize.

    See Also
    --------
    SGD : the same for SGD.
    centralize : for any optimizer, and for the update instead of the gradient.

    Notes
    -----
    With P the projection of `gcx.centralize`, weights w, gradient g of the loss and learning rate
    :math:`\eta`, a step is

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) P g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) (P g)^2, \\
        w &\leftarrow w - \eta \lambda w - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)

    with the squares by element, and hats for the correction of bias. Decay is outside of P.

    On CUDA, with Triton, all of it is one launch for each parameter group and dtype: while a row of
    gradients is in registers, to centralize it takes no access to memory. The gradients in
    ``.grad`` stay what they were there. Torch makes the step, with the hook of `centralize`, which
    writes to ``.grad``, if `foreach`, `fused`, `amsgrad`, `capturable` or `differentiable` is
    given; if a learning rate or the like is a tensor; while other hooks come before the step, which
    may look at the gradients; and for parameters that are not float32, bfloat16 or float16 on CUDA,
    or are no plain tensors, or whose gradient has another dtype or strides.

    ``step()`` is not compiled by `torch.compile`, and runs as it is at a break of the graph.

    References
    ----------
    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, algorithm 2. https://arxiv.org/abs/2004.01461

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    https://arxiv.org/abs/1711.05101

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = gcx.torch.AdamW(model, lr=1e-3)
    >>> optimizer.plan
    <gcx plan: 1 of 2 parameters centralized>
    >>> model(torch.rand(8, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.state_dict())

    Groups are those of torch, beside the model:

    >>> groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    >>> optimizer = gcx.torch.AdamW(groups, lr=1e-3, model=model)

    On a CPU, torch makes the step:

    >>> [bool(reason) for reason in optimizer.fallbacks]
    [True, True]
    """

    # As it is under torch.compile, too: what is compiled would know nothing of the kernels.
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
        layers: Layers = "all",
        overrides: Overrides | None = None,
        reproducible: bool = False,
    ) -> None:
        model = model_of(params, model)
        super().__init__(
            parameters_of(params),
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._centralize(
            AdamWRule(), model, layers=layers, overrides=overrides, reproducible=reproducible
        )


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""SGD with Gradient Centralization: in one launch on CUDA, where it costs next to nothing.

    It does what `torch.optim.SGD` does with `gcx.torch.centralize`, is used as that is, and its
    checkpoints are those of `torch.optim.SGD`.

    Parameters
    ----------
    params : torch.nn.Module or iterable
        A model, which stands for all of its parameters; or parameters, pairs of name and parameter,
        or parameter groups, beside `model`. A group with ``"centralize": False`` is left alone, as
        with `centralize`.
    lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused
        As in `torch.optim.SGD`.
    model : torch.nn.Module, optional
        The model, whose layers say where the fan-in of their weights is. Needed if `params` is not
        a model; it must hold every parameter.
    layers, overrides, reproducible
        As in `centralize`.

    Attributes
    ----------
    plan : gcx.plan.Plan
        What happens to each parameter, and why.
    fallbacks : list of str
        For each parameter group, why torch will make its next step, or that of some parameters; an
        empty text if nothing is left to torch. `repr` shows it too.

    Raises
    ------
    TypeError
        If parameters are given without a model; else as `centralize` and `torch.optim.SGD`.
    ValueError, RuntimeError
        As `centralize` and `torch.optim.SGD`.

    Warns
    -----
    UserWarning
        As `centralize`: if momentum of a checkpoint carries a mean, or a checkpoint switches
        everything off. Copies do not warn; they centralize.

    See Also
    --------
    AdamW : the same for AdamW, and when torch makes the step.
    centralize : for any optimizer, and for the update instead of the gradient.

    Notes
    -----
    With P the projection of `gcx.centralize`, weights w, gradient g of the loss, momentum
    :math:`\mu`, dampening :math:`\tau` and learning rate :math:`\eta`, a step is

    .. math::
        u &\leftarrow P (g + \lambda w), \qquad b \leftarrow \mu b + (1 - \tau) u, \\
        w &\leftarrow w - \eta b \quad \text{or, with Nesterov,} \quad w - \eta (u + \mu b)

    So the mean of each weight over its fan-in stays at its initial value (corollary 4.1).

    References
    ----------
    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, algorithm 1. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = gcx.torch.SGD(model, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    >>> start = model.weight.mean(1).detach()
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.rand(8, 3)).square().mean().backward()
    ...     optimizer.step()
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
        layers: Layers = "all",
        overrides: Overrides | None = None,
        reproducible: bool = False,
    ) -> None:
        model = model_of(params, model)
        super().__init__(
            parameters_of(params),
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._centralize(
            SGDRule(), model, layers=layers, overrides=overrides, reproducible=reproducible
        )
