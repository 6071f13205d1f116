"""SGD, Adam and AdamW with Gradient Centralization, for the arrays of any library.

For NumPy, CuPy and every other library without optimizers of its own. An optimizer holds
hyperparameters and nothing else: state goes in and comes out, and no array is modified.
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
    r"""Stochastic gradient descent, with momentum if wanted, and Gradient Centralization.

    For a weight :math:`w` of gradient :math:`\nabla`, with :math:`P` the centralization:

    .. math::
        g_t &= P(\nabla_t + \lambda w_{t-1}) \\
        b_t &= \mu b_{t-1} + (1 - \tau) g_t, \qquad b_1 = g_1 \\
        w_t &= w_{t-1} - \eta b_t

    Parameters
    ----------
    lr : float
        Learning rate :math:`\eta`.
    weight_decay : float, optional
        :math:`\lambda`, added to the gradient.
    where : {"gradient", "update", None}, optional
        What is centralized: the gradient with its weight decay, as above, or the displacement of
        the weight. Both keep the fan-in means of the weights constant, and for SGD they are the
        same but for rounding. None is plain SGD; `layouts` does not count then.
    layouts : Layout, str, mapping or sequence, optional
        As in `gcx.centralize_many`: one layout for all, a list built like the parameters, or a
        mapping from name or glob to layout; None leaves a parameter alone.
    reproducible : bool, optional
        Centralize as `gcx.centralize` does with ``reproducible=True``. See the notes for what
        becomes of the weights.
    momentum : float, optional
        :math:`\mu`, from 0 to below 1. With 0 there is no buffer, and :math:`b_t` is :math:`g_t`.
    dampening : float, optional
        :math:`\tau`, from 0 to below 1; does not act at the first step.
    nesterov : bool, optional
        Go against :math:`g_t + \mu b_t` in place of :math:`b_t`.

    Raises
    ------
    ValueError
        If a hyperparameter is out of range; if there is dampening or `nesterov` without momentum,
        or both of them.

    Notes
    -----
    The formulas are those of ``torch.optim.SGD``. The state is ``{"step": ..., "momentum": ...}``;
    steps are counted for each parameter, since one without gradient does not take part. Weights of
    float16 or bfloat16 are updated in their own precision; train float32 weights.

    With `reproducible`, equal gradients lead to weights of equal bits on NumPy, torch on a CPU, and
    JAX on a CPU, over any number of steps, in float32 and float64, but for subnormal numbers, which
    JAX takes for zero. Not inside `jax.jit` or `torch.compile`, which round the arithmetic of the
    step in their own ways, nor in narrower dtypes, where libraries round the hyperparameters in
    theirs: there the centralization alone is the same.

    References
    ----------
    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, algorithm 1. https://arxiv.org/abs/2004.01461

    Examples
    --------
    Each output unit keeps the mean of its weights, here 2:

    >>> import numpy as np
    >>> from gcx.optim import SGD
    >>> params = {"kernel": np.array([[1.0, 2.0, 3.0]]), "bias": np.zeros(1)}
    >>> grads = {"kernel": np.array([[1.0, 2.0, 6.0]]), "bias": np.ones(1)}
    >>> optimizer = SGD(0.5, momentum=0.9)
    >>> state = optimizer.init(params)
    >>> params, state = optimizer.update(params, grads, state)
    >>> params
    {'kernel': array([[2. , 2.5, 1.5]]), 'bias': array([-0.5])}

    A schedule makes new optimizers, which go on with the state of the old:

    >>> from dataclasses import replace
    >>> params, state = replace(optimizer, lr=0.05).update(params, grads, state)
    >>> params["kernel"].round(6), params["kernel"].mean().round(6)
    (array([[2.19 , 2.595, 1.215]]), np.float64(2.0))
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_float("momentum", below=1.0)
        self._set_float("dampening", below=1.0)
        if self.nesterov and (not self.momentum or self.dampening):
            msg = (
                "nesterov=True needs momentum and no dampening, not "
                f"momentum={self.momentum}, dampening={self.dampening}"
            )
            raise ValueError(msg)
        if self.dampening and not self.momentum:
            msg = f"dampening={self.dampening} does nothing with momentum=0.0"
            raise ValueError(msg)

    @property
    def _buffers(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def _direction(self, grad: Any, step: Any, *buffers: Any) -> tuple[Any, ...]:
        if not buffers:
            return (grad,)
        # The buffer starts at zero, so without dampening it is the gradient after the first step.
        # A product and no `if`: inside jax.jit the number of the step is not known.
        share = 1 - self.dampening * (step > 1)
        buffer = self.momentum * buffers[0] + share * grad
        return (grad + self.momentum * buffer if self.nesterov else buffer), buffer


@dataclass(frozen=True)
class Adam(Optimizer):
    r"""Adam with Gradient Centralization.

    For a weight :math:`w` of gradient :math:`\nabla`, with :math:`P` the centralization:

    .. math::
        g_t &= P(\nabla_t + \lambda w_{t-1}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) |g_t|^2 \\
        d_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        w_t &= w_{t-1} - \eta d_t

    Parameters
    ----------
    lr : float, optional
        Learning rate :math:`\eta`.
    weight_decay : float, optional
        :math:`\lambda`, added to the gradient.
    where : {"gradient", "update", None}, optional
        ``"gradient"``: as above, ``gc_loc=True`` in the authors' code. The division makes
        :math:`d_t` lose its zero mean, so the fan-in means of the weights drift.
        ``"update"``: :math:`P d_t` in place of :math:`P(\nabla_t + \lambda w_{t-1})`,
        ``gc_loc=False``, which the authors advise for Adam; the means stay constant.
        None is plain Adam; `layouts` does not count then.
    layouts : Layout, str, mapping or sequence, optional
        As in `SGD`.
    reproducible : bool, optional
        Centralize as `gcx.centralize` does with ``reproducible=True``. The rest of the step has
        roots and divisions, which libraries round in their own ways.
    betas : tuple of two floats, optional
        :math:`\beta_1` and :math:`\beta_2`, from 0 to below 1.
    eps : float, optional
        :math:`\epsilon`.

    Raises
    ------
    ValueError
        If a hyperparameter is out of range.

    Notes
    -----
    For real weights the formulas are those of ``torch.optim.Adam``. The state is
    ``{"step": ..., "first_moment": ..., "second_moment": ...}``; steps are counted for each
    parameter, since one without gradient does not take part. Weights of float16 or bfloat16 are
    updated in their own precision; train float32 weights.

    References
    ----------
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1.
    https://arxiv.org/abs/1412.6980

    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, algorithm 2. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.optim import Adam
    >>> params = [np.array([[1.0, 2.0, 3.0]])]
    >>> optimizer = Adam(0.5, where="update")
    >>> state = optimizer.init(params)
    >>> params, state = optimizer.update(params, [np.array([[1.0, 1.0, -4.0]])], state)
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
            msg = f"betas must be two numbers, not {self.betas!r}"
            raise ValueError(msg)
        betas = tuple(as_float(f"betas[{k}]", beta, 1.0) for k, beta in enumerate(self.betas))
        object.__setattr__(self, "betas", betas)

    @property
    def _buffers(self) -> tuple[str, ...]:
        return "first_moment", "second_moment"

    def _direction(self, grad: Any, step: Any, *buffers: Any) -> tuple[Any, ...]:
        beta1, beta2 = self.betas
        m = beta1 * buffers[0] + (1 - beta1) * grad
        v = beta2 * buffers[1] + (1 - beta2) * abs(grad) ** 2
        root = _compat.array_namespace(v).sqrt(v) / (1 - beta2**step) ** 0.5
        return m / (1 - beta1**step) / (root + self.eps), m, v


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    r"""Adam with decoupled weight decay, and Gradient Centralization.

    `Adam` on the gradient without weight decay, which joins the direction instead:

    .. math::
        g_t &= P \nabla_t \\
        w_t &= w_{t-1} - \eta (d_t + \lambda w_{t-1})

    Parameters
    ----------
    lr : float, optional
        Learning rate :math:`\eta`.
    weight_decay : float, optional
        :math:`\lambda`.
    where : {"gradient", "update", None}, optional
        ``"gradient"``: as above; weight decay shrinks the fan-in means of the weights too.
        ``"update"``: :math:`P(d_t + \lambda w_{t-1})` in place of :math:`P \nabla_t`, as in the
        authors' code; the means stay constant. None is plain AdamW; `layouts` does not count then.
    layouts : Layout, str, mapping or sequence, optional
        As in `SGD`.
    reproducible : bool, optional
        As in `Adam`.
    betas : tuple of two floats, optional
        As in `Adam`.
    eps : float, optional
        As in `Adam`.

    Raises
    ------
    ValueError
        If a hyperparameter is out of range.

    Notes
    -----
    The weight decay is that of ``torch.optim.AdamW``. The authors' code divides it by
    :math:`1 - \beta_1^t` besides, which makes it ten times as strong at the first step.

    References
    ----------
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    https://arxiv.org/abs/1711.05101

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.optim import AdamW
    >>> params = [np.array([[1.0, 2.0, 3.0]])]
    >>> optimizer = AdamW(0.5, weight_decay=0.1, where="update")
    >>> state = optimizer.init(params)
    >>> params, state = optimizer.update(params, [np.array([[1.0, 1.0, -4.0]])], state)
    >>> params[0].round(6), params[0].mean().round(6)
    (array([[0.716667, 1.666667, 3.616667]]), np.float64(2.0))
    """

    weight_decay: float = 1e-2

    _decay_is_coupled: ClassVar[bool] = False
