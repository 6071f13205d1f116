"""Measure the gradients of a torch model before you train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gcx._options import Layers, Options
from gcx.backends._torch_dtensor import is_dtensor
from gcx.diagnostics._energy import energy_of
from gcx.diagnostics._report import Energy, EnergyReport, report_of
from gcx.plan import PlanRow
from gcx.torch._plan import Overrides, decide, plan_of

__all__ = ["energy_removed"]

ModelT = TypeVar("ModelT", bound=nn.Module)
BatchT = TypeVar("BatchT")


def energy_removed(
    model: ModelT,
    batches: Iterable[BatchT],
    loss: Callable[[ModelT, BatchT], Tensor],
    *,
    layers: Layers = "all",
    overrides: Overrides | None = None,
) -> EnergyReport:
    """Measure what share of the gradient's energy GC would remove, in each weight of a model.

    The gradient is autograd's, without an optimizer's weight decay. Nothing is trained: parameters,
    their ``.grad``, buffers, modes and torch's random number generators are restored, even after an
    exception. The report has the rows of `gcx.torch.plan`.

    Parameters
    ----------
    model : torch.nn.Module
        On any device, of any dtype, in the mode (``train()`` or ``eval()``) of interest.
    batches : iterable
        Arguments of `loss`; gone through once. A handful is enough.
    loss : callable
        Function of a model and a batch, in ``autocast`` if you train with that; returns one number.
    layers, overrides
        As in `gcx.torch.plan`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gcx.torch.plan`; if there are no batches, or `loss` does not return one number that
        depends on a parameter; if a weight to centralize has a sparse gradient; if FSDP or
        DistributedDataParallel spreads the model over processes.

    Examples
    --------
    >>> import torch
    >>> import gcx.diagnostics.torch
    >>> model, batches = torch.nn.Linear(8, 2), torch.rand(4, 32, 8)
    >>> def loss(model, batch):
    ...     return model(batch).square().mean()
    >>> report = gcx.diagnostics.torch.energy_removed(model, batches, loss)
    >>> [row.name for row in report.rows if row.share is not None]
    ['weight']
    """
    if str(getattr(loss, "__module__", "")).startswith("torch.nn."):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise TypeError(
            f"loss is a function of the model and a batch, and {name} compares outputs with "
            "targets: give a function that calls the model on the batch, and then the criterion"
        )
    decisions = decide(model, Options(layers=layers, overrides=overrides))
    if isinstance(model, DistributedDataParallel) or any(map(is_dtensor, model.parameters())):
        raise RuntimeError(
            "the model is spread over processes: give the model as it is before that, or call "
            "backward() and give [{name: p.grad, ...}] to gcx.diagnostics.energy_removed, with "
            "layouts=gcx.torch.plan(model)"
        )
    plan = plan_of(decisions)
    trained = {row: p for row, p in zip(plan, decisions, strict=True) if p.requires_grad}
    with _unchanged(model), torch.enable_grad():
        measured = [_energies(trained, loss(model, batch)) for batch in batches]
    frozen = "; requires_grad is False"
    rows = [row if row in trained else row._replace(reason=row.reason + frozen) for row in plan]
    return report_of(rows, measured)


def _energies(trained: dict[PlanRow, Tensor], loss: object) -> dict[str, Energy]:
    """Measure the gradients of a loss; parameters that it does not depend on are left out."""
    if not isinstance(loss, Tensor) or loss.ndim:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(
            f"loss(model, batch) is to return a tensor of one number, without axes; not {shape}"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any parameter that requires a gradient, or was computed "
            "under torch.no_grad() or torch.inference_mode()"
        )
    # Not by backward(), which adds to .grad, and after which hooks may step an optimizer.
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    energies = {}
    for row, grad in zip(trained, grads, strict=True):
        if grad is not None:
            # A sparse gradient can count in the total alone; gcx centralizes none.
            is_sparse = row.layout is None and grad.layout is not torch.strided
            energies[row.name] = energy_of(grad.to_dense() if is_sparse else grad, row)
    return energies


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo the changes of forward passes, and of a loss that calls ``backward()`` itself."""
    parameters, modules = list(model.parameters()), list(model.modules())
    buffers = [
        (module, name, buffer)
        for module in modules
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    saved: list[tuple[Any, str, Any]] = [
        *((parameter, "grad", parameter.grad) for parameter in parameters),
        *((module, "training", module.training) for module in modules),
        *buffers,
    ]
    # Forward passes write to copies; modules that share a buffer share its copy.
    copies = {buffer: buffer.detach().clone() for _, _, buffer in buffers}
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices, device_type="cuda"):
        try:
            for parameter in parameters:
                parameter.grad = None
            for module, name, buffer in buffers:
                setattr(module, name, copies[buffer])
            yield
        finally:
            for owner, name, value in saved:
                setattr(owner, name, value)
