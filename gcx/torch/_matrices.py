"""The weights of a model as matrices, for optimizers such as Muon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcx._options import Options
from gcx.backends._torch_dtensor import is_dtensor
from gcx.layout import Layout
from gcx.plan import Plan, PlanRow
from gcx.torch._layers import CONVOLUTIONS
from gcx.torch._plan import Decision, Overrides, decide
from gcx.torch._step import warn_of_copies, wrap_closures

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


def matrices(model: nn.Module, *, overrides: Overrides | None = None) -> Matrices:
    """Split a model into matrices (out, fan-in), as Muon wants them, and the rest.

    The plan decides. Each entry of a stack is a matrix of its own. So are the groups of a
    convolution, the projections in one weight of MultiheadAttention, and the gates of an LSTM.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Its parameters stay as they are.
    overrides : mapping, optional
        As in `plan`. The layer of a head is like any other, so name it to leave it to the rest:
        ``overrides={model.head: gcx.plan.LeaveAlone("head")}``.

    Returns
    -------
    Matrices
        ``.weights`` and ``.rest`` by name, and their ``.plan``. Raises what `plan` raises.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import gcx.torch
    >>> model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(48, 2))
    >>> found = gcx.torch.matrices(model, overrides={model[2]: gcx.plan.LeaveAlone("head")})
    >>> found.split("0.weight", model[0].weight).shape
    torch.Size([2, 4, 18])
    >>> {name: found.plan[name].reason for name in found.rest}
    {'0.bias': 'bias', '2.weight': 'head', '2.bias': 'head'}
    >>> muon = found.make_optimizer(torch.optim.Muon, lr=0.02)
    >>> adamw = torch.optim.AdamW(found.rest.values())
    """
    decisions = decide(model, Options(overrides=overrides))
    rows = {parameter: _row_of_matrices(decision) for parameter, decision in decisions.items()}
    weights = {row.name: parameter for parameter, row in rows.items() if row.layout}
    rest = {row.name: parameter for parameter, row in rows.items() if not row.layout}
    return Matrices(model, Plan(rows.values()), weights, rest)


@dataclass(frozen=True, eq=False, repr=False)
class Matrices:
    """The weights of a model as matrices, and the rest; `gcx.torch.matrices` returns it.

    ``.weights`` and ``.rest`` are parameters by name; ``.plan`` tells which are which, and why.
    """

    _model: nn.Module
    plan: Plan  #: The decision on each parameter; those with a layout are matrices.
    weights: dict[str, Tensor]  #: The parameters that are matrices, by name.
    rest: dict[str, Tensor]  #: All other parameters, by name.

    def split(self, name: str, tensor: Tensor) -> Tensor:
        """Reshape a tensor of the shape of a weight to (stack, out, fan-in): a view if possible."""
        shape, order, sizes = _shapes_of(self.plan[name])
        return tensor.reshape(shape).permute(order).reshape(sizes)

    def join(self, name: str, matrices: Tensor) -> Tensor:
        """Undo `split`."""
        row = self.plan[name]
        shape, order, _ = _shapes_of(row)
        back = sorted(range(len(order)), key=order.__getitem__)
        return matrices.reshape([shape[axis] for axis in order]).permute(back).reshape(row.shape)

    def make_optimizer(self, kind: Callable[..., OptimizerT], **options: Any) -> OptimizerT:
        """Make an optimizer whose parameters are the matrices, and whose steps move the weights.

        `kind` is a class such as ``torch.optim.Muon``, or a function of a list of parameters and
        the options. A step uses up the gradients of the weights: they are None after it, and after
        ``zero_grad()``. Raises a TypeError if a weight is a DTensor; in a step, a RuntimeError if
        one was replaced in the model. Copies of the optimizer move nothing, and warn.
        """
        if sharded := [name for name, weight in self.weights.items() if is_dtensor(weight)]:
            raise TypeError(
                f"{sharded[0]} is a DTensor, and a shard may hold no whole matrix; in a step of "
                "your own, split a full_tensor()"
            )
        held = [
            (name, weight, [nn.Parameter(matrix) for matrix in self.split(name, weight.detach())])
            for name, weight in self.weights.items()
        ]

        @torch.no_grad()
        def load() -> None:
            for name, weight, own in held:
                values, grad = self.split(name, weight.detach()), weight.grad
                grads = [None] * len(own) if grad is None else self.split(name, grad)
                for matrix, value, part in zip(own, values, grads, strict=True):
                    matrix.data, matrix.grad = value, part

        def zero_grad(*_: Any, **__: Any) -> None:
            for _name, weight, own in held:
                for parameter in (weight, *own):
                    parameter.grad = None

        @torch.no_grad()
        def store(*_: Any) -> None:
            for name, weight, own in held:
                if weight.grad is not None:
                    weight.copy_(self.join(name, torch.stack([*own])))
            zero_grad()

        def load_after(closure: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: (closure(*args), load())[0]

        def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            here = {*self._model.parameters()}
            if gone := [name for name, weight, _ in held if weight not in here]:
                raise RuntimeError(
                    f"{gone[0]} was replaced in the model, and the optimizer would move the old "
                    "one; call gcx.torch.matrices and make the optimizer after that"
                )
            load()
            return wrap_closures(load_after, args, kwargs)

        optimizer = kind([matrix for *_, own in held for matrix in own], **options)
        optimizer.register_step_pre_hook(before_step)
        optimizer.register_step_post_hook(store)
        vars(optimizer)["zero_grad"] = zero_grad
        warn_of_copies(optimizer, "moves no weights", "gcx.torch.matrices for the copied model")
        return optimizer


def _shapes_of(row: PlanRow) -> tuple[tuple[int, ...], list[int], list[int]]:
    """Return a shape with one axis a letter, its axes in the order b, o, i, and three sizes."""
    assert row.layout is not None
    (shape, _), letters = row.layout.split(row.shape), row.layout.letters(len(row.shape))
    order = [axis for letter in "boi" for axis, own in enumerate(letters) if own == letter]
    pairs = list(zip(letters, shape, strict=True))
    return shape, order, [prod(n for own, n in pairs if own == letter) for letter in "boi"]


def _row_of_matrices(decision: Decision) -> PlanRow:
    """Return the row, with a stack if its layer keeps several maps side by side."""
    row = decision.row
    if row.layout is None:
        return row
    count = _count_maps(decision.layer, row.shape[0])
    if count > 1 and str(row.layout) == "o...":
        row = row._replace(layout=Layout("(bo)...", b=count), reason=f"{row.reason}, {count} maps")
    if _shapes_of(row)[2][1] < 2:
        row = row._replace(layout=None, reason=f"{row.reason}: one output unit, so a vector")
    return row


def _count_maps(layer: nn.Module | None, units: int) -> int:
    """Count the linear maps among the output units of a weight: groups, projections or gates."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups
    if isinstance(layer, nn.MultiheadAttention):
        return int(units // layer.embed_dim)
    return units // layer.hidden_size if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) else 1
