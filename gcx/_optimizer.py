"""The base class of the optimizers in `gcx.optim`: a step over a tree of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from math import inf
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar

from gcx import _compat
from gcx._centralize import centralize, check_strength, see_fan_in
from gcx._decisions import check_choice
from gcx._dispatch import backend_for
from gcx._frameworks import describe
from gcx._layouts import Layouts, layouts_for
from gcx._names import flatten, leaves_like, naming, rebuild
from gcx._outputs import check_traits
from gcx.layout import Layout, as_layout

TreeT = TypeVar("TreeT")
Where = Literal["gradient", "update"] | None


@dataclass(frozen=True)
class Optimizer:
    """Base class: applies weight decay and centralization to each parameter in a step.

    A subclass defines the names of its state arrays, `_buffers`, and turns a gradient into a
    descent direction, `_find_direction`.
    """

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
        with arrays of the weights' shapes and dtypes. Raises a TypeError if `params` has anything
        but floating arrays, or an array that `reproducible` does not support; a ValueError if
        `layouts` does not fit, or centralizes nothing.
        """
        named = _named_params(params)
        if self.where is not None and not any(self._find_layouts(params)):
            shapes = ", ".join(f"{name} {tuple(param.shape)}" for name, param in named)
            raise ValueError(
                f"layouts={self.layouts!r} centralizes no parameter: at least one needs a layout, "
                f"and a fan-in of at least 2; there are {shapes}. For no Gradient Centralization "
                "use where=None"
            )
        zeros = [
            [_compat.array_namespace(param).zeros_like(param) for _, param in named]
            for _ in self._buffers
        ]
        return self._make_state(params, [[0] * len(named), *zeros])

    def update(
        self, params: TreeT, grads: Any, state: Mapping[str, Any]
    ) -> tuple[TreeT, dict[str, Any]]:
        """Take one step: return the new weights, of the same dtypes, and the new state.

        `grads` are built like `params`, of the same libraries, shapes and dtypes; None leaves a
        parameter and its state unchanged. Raises a TypeError or ValueError, before any computation,
        if `grads` or `state` do not fit, or `reproducible` does not support an array.

        A lazy library such as dask adds each step to its graph, so compute the results from time to
        time. PyTorch records the step for autograd, unless under ``torch.no_grad()``.
        """
        updated = [self._step(*row) for row in self._check_rows(params, grads, state)]
        new_params, *columns = zip(*updated, strict=True)
        return rebuild(params, new_params), self._make_state(params, columns)

    def _step(
        self, layout: Layout | None, param: Any, grad: Any, step: Any, *buffers: Any
    ) -> tuple[Any, ...]:
        """Update one parameter: return its new value, step and buffers."""
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
        """Compute the direction and the new buffers from the gradient; the first step is 1."""
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
        keys = ("step", *self._buffers)
        if not isinstance(state, Mapping):
            raise TypeError(
                f"state comes from init(params) or the last update, not {type(state).__name__}"
            )
        if set(state) != set(keys):
            raise ValueError(
                f"state has {sorted(state)}, but {type(self).__name__} keeps {sorted(keys)}"
            )
        names, weights = zip(*_named_params(params), strict=True)
        trees = {"grads": grads, **{f"state[{key!r}]": state[key] for key in keys}}
        columns = [
            leaves_like(params, tree, what=what, like="params") for what, tree in trees.items()
        ]
        rows = list(zip(self._find_layouts(params), weights, *columns, strict=True))
        for name, (_, param, grad, _, *buffers) in zip(names, rows, strict=True):
            with naming(name):
                if grad is not None:
                    _check_fits("gradient", grad, param)
                for key, buffer in zip(self._buffers, buffers, strict=True):
                    _check_fits(key, buffer, param)
        return rows

    def _make_state(self, params: Any, columns: Sequence[Sequence[Any]]) -> dict[str, Any]:
        keys = ("step", *self._buffers)
        return {key: rebuild(params, column) for key, column in zip(keys, columns, strict=True)}

    def _set_float(self, name: str, below: float = inf) -> None:
        object.__setattr__(self, name, as_float(name, getattr(self, name), below))


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
    if new.dtype == old.dtype:
        return new
    return _compat.array_namespace(new).astype(new, old.dtype)


def as_float(name: str, value: float, below: float) -> float:
    """Check a hyperparameter; return a Python float, since a NumPy float widens float32 arrays."""
    if not (isinstance(value, Real) and 0.0 <= value < below):
        msg = f"{name} must be a number in [0, {below}), not {value!r}"
        if callable(value) or hasattr(value, "shape"):
            msg += f"; for a schedule use dataclasses.replace(optimizer, {name}=...) at each step"
        raise ValueError(msg)
    return float(value)
