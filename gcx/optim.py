"""SGD, Adam and AdamW with Gradient Centralization, for the arrays of any library.

They serve NumPy, CuPy and other libraries without optimizers. An optimizer holds hyperparameters
alone: it takes the state and returns a new one, and modifies no array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from gcx import _compat
from gcx._optimizer import Optimizer, as_float

__all__ = ["SGD", "Adam", "AdamW"]


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    r"""Stochastic gradient descent with Gradient Centralization, and optional momentum.

    For a weight :math:`w` with gradient :math:`\nabla`, and the centralization :math:`P`:

    .. math::
        g_t &= P(\nabla_t + \lambda w_{t-1}) \\
        b_t &= \mu b_{t-1} + g_t, \qquad b_0 = 0 \\
        w_t &= w_{t-1} - \eta b_t

    Parameters
    ----------
    lr : float
        Learning rate :math:`\eta`.
    weight_decay : float, optional
        :math:`\lambda`, added to the gradient.
    where : {"gradient", "update", None}, optional
        Centralize the gradient with its weight decay, as above, or the displacement of the weight.
        For SGD they differ by rounding alone. None is plain SGD, and ignores `layouts`.
    layouts, strength, reproducible : optional
        As in `gcx.centralize_many`.
    momentum : float, optional
        :math:`\mu`, from 0 to below 1. With 0 there is no buffer, and :math:`b_t` is :math:`g_t`.
    nesterov : bool, optional
        Step against :math:`g_t + \mu b_t` instead of :math:`b_t`.

    Raises
    ------
    ValueError
        If a hyperparameter is out of range, or they contradict each other.

    Notes
    -----
    The formulas follow ``torch.optim.SGD``. The state is ``{"step": ..., "momentum": ...}``. Each
    parameter counts its own steps, those with a gradient. Weights of float16 or bfloat16 are
    updated in their own precision, so float32 is better. The promises of `reproducible` for a
    step are on :doc:`/reproducible`.

    References
    ----------
    Yong et al., "Gradient Centralization", ECCV 2020, algorithm 1. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.optim import SGD
    >>> params, grads = [np.array([[1.0, 2.0, 3.0]])], [np.array([[1.0, 2.0, 6.0]])]
    >>> optimizer = SGD(0.5, momentum=0.9)  # dataclasses.replace(optimizer, lr=...) for a schedule
    >>> optimizer.update(params, grads, optimizer.init(params))[0]  # the mean stays 2
    [array([[2. , 2.5, 1.5]])]
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_float("momentum", below=1.0)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True needs momentum, not momentum=0.0")

    @property
    def _buffers(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def _find_direction(self, grad: Any, _step: Any, *buffers: Any) -> tuple[Any, ...]:
        if not buffers:
            return (grad,)
        buffer = self.momentum * buffers[0] + grad
        return (grad + self.momentum * buffer if self.nesterov else buffer), buffer


@dataclass(frozen=True)
class Adam(Optimizer):
    r"""Adam with Gradient Centralization.

    The gradient :math:`g_t` is as in `SGD`; the step is :math:`w_t = w_{t-1} - \eta d_t`. Here

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) |g_t|^2 \\
        d_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Parameters
    ----------
    lr, weight_decay, layouts, strength, reproducible : optional
        As in `SGD`.
    where : {"gradient", "update", None}, optional
        ``"gradient"`` is as above; the division makes the fan-in means of the weights drift.
        ``"update"`` centralizes :math:`d_t` instead of the gradient; the means stay constant. This
        is ``gc_loc=False`` in the authors' code. :doc:`/where_in_the_step` says which to take.
        None is plain Adam.
    betas : tuple of two floats, optional
        :math:`\beta_1` and :math:`\beta_2`, from 0 to below 1.
    eps : float, optional
        :math:`\epsilon`.

    Notes
    -----
    For real weights the formulas follow ``torch.optim.Adam``. The state is ``{"step": ...,
    "first_moment": ..., "second_moment": ...}``. Steps and precision are as in `SGD`; but libraries
    round roots and divisions in their own ways, so `reproducible` holds for the projection alone.

    References
    ----------
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1.
    https://arxiv.org/abs/1412.6980. Centralized: Yong et al. (see `SGD`), algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.optim import Adam
    >>> params, grads = [np.array([[1.0, 2.0, 3.0]])], [np.array([[1.0, 1.0, -4.0]])]
    >>> optimizer = Adam(0.5, where="update")
    >>> params, state = optimizer.update(params, grads, optimizer.init(params))
    >>> params[0].round(6), params[0].mean().round(6)
    (array([[0.666667, 1.666667, 3.666667]]), np.float64(2.0))
    """

    lr: float = 1e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_float("eps")
        if not (isinstance(self.betas, Sequence) and len(self.betas) == 2):
            raise ValueError(f"betas must be two numbers, not {self.betas!r}")
        betas = tuple(as_float(f"betas[{k}]", beta, 1.0) for k, beta in enumerate(self.betas))
        object.__setattr__(self, "betas", betas)

    @property
    def _buffers(self) -> tuple[str, ...]:
        return "first_moment", "second_moment"

    def _find_direction(self, grad: Any, step: Any, *buffers: Any) -> tuple[Any, ...]:
        beta1, beta2 = self.betas
        m = beta1 * buffers[0] + (1 - beta1) * grad
        v = beta2 * buffers[1] + (1 - beta2) * abs(grad) ** 2
        root = _compat.array_namespace(v).sqrt(v) / (1 - beta2**step) ** 0.5
        return m / (1 - beta1**step) / (root + self.eps), m, v


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    r"""Adam with decoupled weight decay, and Gradient Centralization.

    As `Adam`, but weight decay is added to the direction, not to the gradient:

    .. math::
        g_t &= P \nabla_t \\
        w_t &= w_{t-1} - \eta (d_t + \lambda w_{t-1})

    Parameters
    ----------
    where : {"gradient", "update", None}, optional
        ``"gradient"`` is as above; weight decay shrinks the fan-in means of the weights too.
        ``"update"`` steps by :math:`P(d_t + \lambda w_{t-1})` and leaves the gradient as it is, as
        in the authors' code; the means stay constant. None is plain AdamW.
    lr, weight_decay, layouts, strength, reproducible, betas, eps : optional
        As in `Adam`.

    Notes
    -----
    The weight decay follows ``torch.optim.AdamW``. The authors' code also divides it by
    :math:`1 - \beta_1^t`, so it is ten times as strong at the first step.

    References
    ----------
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    https://arxiv.org/abs/1711.05101

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.optim import AdamW
    >>> params, grads = [np.array([[1.0, 2.0, 3.0]])], [np.array([[1.0, 1.0, -4.0]])]
    >>> optimizer = AdamW(0.5, weight_decay=0.1, where="update")
    >>> params, state = optimizer.update(params, grads, optimizer.init(params))
    >>> params[0].round(6), params[0].mean().round(6)
    (array([[0.716667, 1.666667, 3.616667]]), np.float64(2.0))
    """

    weight_decay: float = 1e-2

    _decay_is_coupled: ClassVar[bool] = False
