"""Hold a plan against one forward pass: which entries of a weight feed one output."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from gcx._options import Options
from gcx.plan import PlanRow
from gcx.torch._plan import Overrides, decide

_OUTPUTS_TRIED = 4
# Operations that sum products: a constant that enters one with a weight counts as data.
_SUM = re.compile(r"linear|matmul|__r?matmul__|b?mm|einsum|tensordot|conv.*")
# Operations that change their first argument.
_IN_PLACE = re.compile(r"__set(item)?__|(.*[^_])?_")

# Origins of a tensor, besides the names of weights.
_DATA = frozenset({""})
_CONSTANT: frozenset[str] = frozenset()


class PlanCheck(NamedTuple):
    """Centralized weights, by how the forward pass used them."""

    agree: tuple[str, ...]
    disagree: Mapping[str, str]  # with the use that contradicts the plan
    unseen: tuple[str, ...]  # without a use that tells


def check_plan(
    model: nn.Module, *inputs: Any, overrides: Overrides | None = None, **kwargs: Any
) -> PlanCheck:
    """Run the model once, and compare how it uses its weights with the plan.

    Each operation in which a centralized weight meets data runs again with random data. Autograd
    tells which entries of the weight feed one output; the plan expects the entries of one unit. The
    data are the same in each call, and torch's random state stays as it is.

    Parameters
    ----------
    model : torch.nn.Module
        Any model that can run. It stays in the mode it is in (``model.eval()`` keeps running
        statistics as they are).
    *inputs, **kwargs
        Arguments of the model: tensors, or lists and dicts of them.
    overrides : mapping, optional
        As for `plan`.

    Returns
    -------
    NamedTuple
        ``agree`` and ``unseen`` hold names of centralized weights, ``disagree`` maps names to
        sentences. Raises what `plan` and the model raise. :doc:`/torch_layers` tells the limits.

    Examples
    --------
    >>> import torch
    >>> import gcx.torch
    >>> gcx.torch.check_plan(torch.nn.Linear(8, 3), torch.rand(4, 8)).agree
    ('weight',)
    >>> tied = torch.nn.Linear(3, 3)
    >>> tied.forward = lambda x: x @ tied.weight  # another way around than a Linear
    >>> gcx.torch.check_plan(tied, torch.rand(4, 3)).disagree["weight"]
    'layout o..., but one output of matmul takes 3 entries from 3 output units of 3'
    """
    decisions = decide(model, Options(overrides=overrides))
    weights = {p: d.row for p, d in decisions.items() if d.row.layout is not None}
    frozen = [weight for weight in weights if not weight.requires_grad]
    uses = _Uses(weights, (inputs, kwargs))
    try:
        for weight in frozen:
            weight.requires_grad_()
        with torch.enable_grad(), uses:
            model(*inputs, **kwargs)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    names = [row.name for row in weights.values()]
    return PlanCheck(
        tuple(name for name in names if uses.found.get(name) == ""),
        {name: uses.found[name] for name in names if uses.found.get(name)},
        tuple(name for name in names if name not in uses.found),
    )


class _Uses(TorchFunctionMode):
    """Follow weights through everything that is made of weights alone, up to where data enter."""

    def __init__(self, weights: Mapping[Tensor, PlanRow], data: Any) -> None:
        super().__init__()
        self.found: dict[str, str] = {}  # by weight: how a use contradicts the plan, or ""
        self._weights: dict[str, tuple[Tensor, Any]] = {}
        self._origin: Any = WeakIdKeyDictionary()  # by tensor: weights it is made of, or _DATA
        for weight, row in weights.items():
            self._weights[row.name] = weight, row.layout
            self._origin[weight] = frozenset({row.name})
        self._mark(data, _DATA)
        # The global generator and the default device are the user's.
        self._draws: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        leaves, tree = tree_flatten((args, kwargs or {}))
        origin = [
            self._origin.get(x, _CONSTANT) if isinstance(x, Tensor) else _CONSTANT for x in leaves
        ]
        names = _CONSTANT.union(*origin) - _DATA
        is_sum = bool(names) and _SUM.fullmatch(func.__name__) is not None
        kinds = (_DATA, _CONSTANT) if is_sum else (_DATA,)
        data = [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and origin[k] in kinds]
        numbers = [k for k in data if leaves[k].is_floating_point() or leaves[k].is_complex()]
        changed = args[:1] if _IN_PLACE.fullmatch(func.__name__) else ()
        is_weight = bool(names) and not numbers
        if names and numbers and not changed:

            def again(new: Sequence[Tensor]) -> Any:
                replaced = dict(zip(numbers, new, strict=True))
                with_new = [replaced.get(k, leaf) for k, leaf in enumerate(leaves)]
                new_args, new_kwargs = tree_unflatten(with_new, tree)
                return func(*new_args, **new_kwargs)

            made = [leaf for leaf, found in zip(leaves, origin, strict=True) if found - _DATA]
            given = [leaves[k] for k in numbers]
            is_weight = self._examine(again, given, made, names, func.__name__)
        result = func(*args, **(kwargs or {}))
        # Integers only choose among weights.
        if data and not is_weight:
            self._mark((result, changed), _DATA)
        elif names and not is_sum:  # a product of weights is made of whole units, or of none
            self._mark((result, changed), names)
        return result

    def _mark(self, tree: Any, names: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._origin[leaf] = names

    def _examine(
        self, again: Any, data: list[Tensor], made: list[Tensor], names: Any, use: str
    ) -> bool:
        """Record what the outputs depend on; return True if they do not depend on the data.

        The operation `again` got the tensors `made`, each made of weights.
        """
        # Random data can be refused, and a second derivative; transforms of torch.func refuse both.
        with suppress(RuntimeError):
            # From 0.5 to 1.5: no product is zero.
            new = [(self._draw(x) + 0.5).requires_grad_() for x in data]
            results = [x for x in tree_leaves(again(new)) if isinstance(x, Tensor)]
            numbers = [x.flatten() for x in results if x.is_floating_point()]
            output = torch.cat(numbers) if numbers else torch.zeros(1)
            if not any(map(Tensor.any, _derivatives(output.sum(), new))):
                return True
            for name in names:
                for problem in self._compare(name, output, new, made, use):
                    self.found[name] = self.found.get(name) or problem
        return False

    def _compare(
        self, name: str, output: Tensor, data: list[Tensor], made: list[Tensor], use: str
    ) -> Iterator[str]:
        """Compare some outputs with the layout of a weight: a sentence, or "" where they agree."""
        weight, layout = self._weights[name]
        view, axes = layout.split(tuple(weight.shape))
        letters = layout.letters(weight.ndim)
        for k in torch.randint(len(output), (_OUTPUTS_TRIED,), **self._draws).tolist():
            grad, *others = _derivatives(output[k], [weight, *data])
            if not any(map(Tensor.any, others)) or not grad.any():
                continue
            if grad.requires_grad and _derivatives(grad.sum(), [weight])[0].any():
                continue  # not linear: by a norm of the weight, each unit depends on all others
            enters = grad.reshape(view) != 0
            units, whole = enters.any(axes), enters.all(axes)
            if units.sum() == 1 and "conv" in use and not whole.equal(units):
                # At an edge, an output sees a part of the kernel; together they see all of it.
                some = output @ self._draw(output)
                total, *direct = torch.autograd.grad(some, [weight, *made], retain_graph=True)
                if not all((x != 0).all() for x in direct):
                    continue  # padding hides a part of the kernel from this input
                whole = units & (total.reshape(view) != 0).all(axes)
            is_whole = whole.equal(units)
            if is_whole and units.sum() == 1:
                yield ""
            elif units.sum() > 1 and not (len(made) == 1 and _SUM.fullmatch(use)):
                continue  # an operation of several layers, such as an RNN
            elif not _is_stack(enters, letters.replace("i", "b") if is_whole else letters):
                yield (
                    f"layout {layout}, but one output of {use} takes {int(enters.sum())} entries "
                    f"from {int(units.sum())} output units of {prod(view[axis] for axis in axes)}"
                )

    def _draw(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, dtype=like.dtype, **self._draws).to(like.device)


def _is_stack(enters: Tensor, letters: str) -> bool:
    """Return True for entries that differ in their places along the stack, and in no other.

    Data may mix the layers of a stack into one weight.
    """
    places = enters.nonzero()
    varies = (places != places[0]).any(0).tolist()
    return {letter for letter, moves in zip(letters, varies, strict=True) if moves} == {"b"}


def _derivatives(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, create_graph=True, materialize_grads=True)
