"""SGD, Adam and AdamW with Gradient Centralization, for the arrays of any library.

They serve NumPy, CuPy and other libraries without optimizers. An optimizer holds hyperparameters
alone: it takes the state and returns a new one, and modifies no array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from math import inf
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar

from gcx import _compat
from gcx._centralize import centralize, check_strength, check_traits, see_fan_in
from gcx._decisions import check_choice
from gcx._dispatch import backend_for
from gcx._frameworks import describe
from gcx._names import Layouts, flatten, layouts_for, leaves_like, naming, rebuild
from gcx.layout import Layout, as_layout

__all__ = ["SGD", "Adam", "AdamW"]

TreeT = TypeVar("TreeT")
Where = Literal["gradient", "update"] | None


@dataclass(frozen=True)
class Optimizer:
    """A step with weight decay and centralization; a subclass finds the direction."""

    lr: float
    _: KW_ONLY
    weight_decay: float = 0.0
    where: Where = "gradient"
    layouts: Layouts = "o..."
    strength: float = 1.0
    reproducible: bool = False

    _decay_is_coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._set_float("lr")
        self._set_float("weight_decay")
        check_choice("where", self.where, ("gradient", "update", None))
        check_choice("reproducible", self.reproducible, (True, False))
        if isinstance(self.layouts, str):
            as_layout(self.layouts)
        object.__setattr__(self, "strength", check_strength(self.strength))

    def init(self, params: Any) -> dict[str, Any]:
        """Make the initial state of weights in a list, tuple or dict, which may be nested.

        It is a dict of trees built like `params`: ``"step"`` with ints, and one for each buffer,
        with arrays of the weights' shapes and dtypes. Raises a TypeError or ValueError if `params`,
        `layouts` and `reproducible` do not fit each other, or nothing is centralized.
        """
        named = _named_params(params)
        if self.where is not None and not any(self._find_layouts(params)):
            shapes = ", ".join(f"{name} {tuple(param.shape)}" for name, param in named)
            raise ValueError(
                f"layouts={self.layouts!r} centralizes no parameter among {shapes}: "
                "give one with a fan-in of at least 2 a layout, or use where=None"
            )
        state = {"step": rebuild(params, [0] * len(named))}
        for key in self._buffers:
            zeros = [_compat.array_namespace(param).zeros_like(param) for _, param in named]
            state[key] = rebuild(params, zeros)
        return state

    def update(
        self, params: TreeT, grads: Any, state: Mapping[str, Any]
    ) -> tuple[TreeT, dict[str, Any]]:
        """Take one step: return the new weights, of the same dtypes, and the new state.

        `grads` are built like `params`, of the same libraries, shapes and dtypes; None leaves a
        parameter and its state unchanged. Raises a TypeError or ValueError, before any computation,
        if `grads` or `state` do not fit.
        """
        updated = [self._step(*row) for row in self._check_rows(params, grads, state)]
        new_params, *columns = [rebuild(params, column) for column in zip(*updated, strict=True)]
        return new_params, dict(zip(("step", *self._buffers), columns, strict=True))

    def _step(
        self, layout: Layout | None, param: Any, grad: Any, step: Any, *buffers: Any
    ) -> tuple[Any, ...]:
        if grad is None:
            return param, step, *buffers
        if self.weight_decay and self._decay_is_coupled:
            grad = grad + self.weight_decay * param
        if self.where == "gradient":
            grad = self._project(grad, layout)
        direction, *new_buffers = self._find_direction(grad, step + 1, *buffers)
        if self.weight_decay and not self._decay_is_coupled:
            direction = direction + self.weight_decay * param
        if self.where == "update":
            direction = self._project(direction, layout)
        new_param = _as_dtype_of(param, param - self.lr * direction)
        return new_param, step + 1, *map(_as_dtype_of, buffers, new_buffers)

    def _project(self, x: Any, layout: Layout | None) -> Any:
        if layout is None:
            return x
        return centralize(x, layout=layout, strength=self.strength, reproducible=self.reproducible)

    @property
    def _buffers(self) -> tuple[str, ...]:
        raise NotImplementedError

    def _find_direction(self, grad: Any, step: Any, *buffers: Any) -> tuple[Any, ...]:
        """Return the direction and the new buffers; the first step is 1."""
        raise NotImplementedError

    def _find_layouts(self, params: Any) -> list[Layout | None]:
        """Find the layout of each parameter; None if there is nothing to centralize."""
        named = flatten(params)
        if self.where is None:
            return [None] * len(named)
        found = layouts_for(named, self.layouts, like=params)
        for k, ((name, param), layout) in enumerate(zip(named, found, strict=True)):
            with naming(name):
                if layout and not see_fan_in(param, layout, reproducible=self.reproducible)[1]:
                    found[k] = None
        return found

    def _check_rows(
        self, params: Any, grads: Any, state: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """List the layout, value, gradient, step and buffers of each parameter, once checked."""
        keys = ["step", *self._buffers]
        has = [*state] if isinstance(state, Mapping) else type(state).__name__
        if {*has} != {*keys}:
            raise ValueError(
                f"state comes from init(params) or the last update, and has {keys}, not {has}"
            )
        names, weights = zip(*_named_params(params), strict=True)
        trees = {"grads": grads, **{f"state[{key!r}]": state[key] for key in keys}}
        columns = [leaves_like(params, tree, what=k, like="params") for k, tree in trees.items()]
        rows = list(zip(self._find_layouts(params), weights, *columns, strict=True))
        for name, (_, param, grad, _, *buffers) in zip(names, rows, strict=True):
            with naming(name):
                if grad is not None:
                    _check_fits("gradient", grad, param)
                for key, buffer in zip(self._buffers, buffers, strict=True):
                    _check_fits(key, buffer, param)
        return rows

    def _set_float(self, name: str, below: float = inf) -> None:
        object.__setattr__(self, name, _as_float(name, getattr(self, name), below))


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
        Centralize the gradient with its weight decay, or the displacement of the weight; for SGD
        they differ by rounding alone. None is plain SGD, and ignores `layouts`.
    layouts, strength, reproducible : optional
        As in `gcx.centralize_many`.
    momentum : float, optional
        :math:`\mu`, from 0 to below 1. With 0 there is no buffer, and :math:`b_t` is :math:`g_t`.
    nesterov : bool, optional
        Step against :math:`g_t + \mu b_t` instead of :math:`b_t`.

    Notes
    -----
    A hyperparameter that is out of range raises a ValueError. The state is ``{"step": ...,
    "momentum": ...}``. The formulas follow ``torch.optim.SGD`` and Yong et al., "Gradient
    Centralization", ECCV 2020, algorithm 1 (https://arxiv.org/abs/2004.01461).

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
        ``"update"`` centralizes :math:`d_t` instead; the means stay constant. This is
        ``gc_loc=False`` in the authors' code. :doc:`/where_in_the_step` compares them.
    betas : tuple of two floats, optional
        :math:`\beta_1` and :math:`\beta_2`, from 0 to below 1.
    eps : float, optional
        :math:`\epsilon`.

    Notes
    -----
    The state is ``{"step": ..., "first_moment": ..., "second_moment": ...}``. For real weights the
    formulas follow ``torch.optim.Adam``: Kingma and Ba, "Adam: A Method for Stochastic
    Optimization", ICLR 2015, algorithm 1 (https://arxiv.org/abs/1412.6980); centralized by
    algorithm 2 of Yong et al. (see `SGD`). `reproducible` holds for the projection alone.

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.optim import Adam
    >>> params, grads = [np.array([[1.0, 2.0, 3.0]])], [np.array([[1.0, 1.0, -4.0]])]
    >>> optimizer = Adam(0.5, where="update")
    >>> optimizer.update(params, grads, optimizer.init(params))[0][0].round(6)  # the mean stays 2
    array([[0.666667, 1.666667, 3.666667]])
    """

    lr: float = 1e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    _buffers: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_float("eps")
        if not (isinstance(self.betas, Sequence) and len(self.betas) == 2):
            raise ValueError(f"betas must be two numbers, not {self.betas!r}")
        betas = tuple(_as_float(f"betas[{k}]", beta, 1.0) for k, beta in enumerate(self.betas))
        object.__setattr__(self, "betas", betas)

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
        in the authors' code; the means stay constant.
    lr, weight_decay, layouts, strength, reproducible, betas, eps : optional
        As in `Adam`.

    Notes
    -----
    The weight decay follows ``torch.optim.AdamW``: Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization", ICLR 2019, algorithm 2 (https://arxiv.org/abs/1711.05101).

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.optim import AdamW
    >>> params, grads = [np.array([[1.0, 2.0, 3.0]])], [np.array([[1.0, 1.0, -4.0]])]
    >>> optimizer = AdamW(0.5, weight_decay=0.1, where="update")
    >>> optimizer.update(params, grads, optimizer.init(params))[0][0].round(6)
    array([[0.716667, 1.666667, 3.616667]])
    """

    weight_decay: float = 1e-2

    _decay_is_coupled: ClassVar[bool] = False


def _named_params(params: Any) -> list[tuple[str, Any]]:
    if not isinstance(params, (list, tuple, dict)):
        raise TypeError(f"params is a list, tuple or dict of arrays, not {describe(params)}")
    named = flatten(params)
    if not named:
        raise ValueError("params holds no array")
    for name, param in named:
        with naming(name):
            backend_for(param).check_dtype(param)
    return named


def _check_fits(what: str, array: Any, param: Any) -> None:
    if backend_for(array) is not backend_for(param):
        kinds = type(array).__name__, type(param).__name__
        raise TypeError(f"the {what} is a {kinds[0]}, its parameter a {kinds[1]}")
    check_traits(f"the {what}", array, "its parameter", param, ("shape", "dtype"))


def _as_dtype_of(old: Any, new: Any) -> Any:
    """Undo dtype promotion caused by a step counter that is an array (restored or traced)."""
    return new if new.dtype == old.dtype else _compat.array_namespace(new).astype(new, old.dtype)


def _as_float(name: str, value: float, below: float) -> float:
    """Check a hyperparameter; return a Python float, since a NumPy float widens float32 arrays."""
    if not (isinstance(value, Real) and 0.0 <= value < below):
        wrong = f"{name} must be a number in [0, {below}), not {value!r}"
        raise ValueError(f"{wrong}; for a schedule use dataclasses.replace at each step")
    return float(value)
