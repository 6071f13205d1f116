"""Optimizer classes for trainers that make the optimizer themselves."""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from functools import wraps
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from gcx._options import Decay, Layers, Options, Where
from gcx.torch._centralize import GradientCentralization
from gcx.torch._plan import Overrides

Kind = TypeVar("Kind", bound=Optimizer)


def derive_class(
    kind: type[Kind],
    model: nn.Module,
    *,
    where: Where = "gradient",
    decay: Decay = None,
    strength: float = 1.0,
    layers: Layers = "all",
    overrides: Overrides | None = None,
    reproducible: bool = False,
) -> type[Kind]:
    """Derive an optimizer class that calls `centralize`, for a trainer that takes a class.

    Parameters
    ----------
    kind : type
        The class of the optimizer, such as ``torch.optim.RAdam``.
    model : torch.nn.Module
        The model that will hold every parameter of the optimizer.
    where, decay, strength, layers, overrides, reproducible
        As in `centralize`.

    Returns
    -------
    type
        A subclass of `kind` with the same arguments. It can be pickled, and takes the model along.
        In its own process, cloudpickle returns the class itself, which keeps its model.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If `kind` is not a torch optimizer class, or an option has no such value; when an optimizer
        is made, as `centralize`.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> gcx.torch.derive_class(torch.optim.RAdam, model, where="update")
    <class 'torch.optim.radam.RAdam', centralized for a Linear, where='update'>
    """
    options = Options(
        where=where,
        decay=decay,
        strength=strength,
        layers=layers,
        overrides=overrides,
        reproducible=reproducible,
    )
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"kind is a torch optimizer class, such as torch.optim.RAdam, not {kind!r}")
    derived: type[Kind] = _derive(kind)
    _bind(derived, (model, options))
    return derived


_BINDING = "_gcx_binding"  # of a derived class: its model and its options


class _Derived(ABCMeta):  # some packages have abstract optimizers
    """Class of the classes that `derive_class` makes: it prints and pickles them."""

    def __repr__(cls) -> str:
        if _BINDING not in vars(cls):  # a subclass of a derived one, by a class statement
            return super().__repr__()
        model, options = vars(cls)[_BINDING]
        kind = repr(cls.__base__).removesuffix(">")
        return f"{kind}, centralized for a {type(model).__name__}, where={options.where!r}>"

    def __setattr__(cls, name: str, value: Any) -> None:
        # In its own process, cloudpickle loads the class itself, and a copy of the model.
        if name != _BINDING or name not in vars(cls):
            super().__setattr__(name, value)


def _derive(kind: type[Optimizer]) -> Any:
    @wraps(kind.__init__)
    def initialize(self: Optimizer, *arguments: Any, **named: Any) -> None:
        kind.__init__(self, *arguments, **named)
        GradientCentralization(self, *vars(derived)[_BINDING])

    derived = _Derived(kind.__name__, (kind,), {"__init__": initialize})
    return derived


def _bind(derived: type, binding: tuple[nn.Module, Options]) -> None:
    setattr(derived, _BINDING, binding)


def _reduce(cls: type) -> Any:
    if _BINDING not in vars(cls):
        return cls.__qualname__
    # Bound at last, since the model may hold the class.
    return _derive, (cls.__base__,), vars(cls)[_BINDING], None, None, _bind


copyreg.pickle(_Derived, _reduce)
