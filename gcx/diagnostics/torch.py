"""What Gradient Centralization would do to a model of torch, before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gcx._options import Layers, Options
from gcx.backends._torch_dtensor import is_dtensor
from gcx.diagnostics._energy import Energy, energy_of
from gcx.diagnostics._report import EnergyReport, report_of
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

    Parameters
    ----------
    model : torch.nn.Module
        On any device, of any dtype, in the mode (``train()`` or ``eval()``) that is of interest.
    batches : iterable
        What `loss` takes; gone through once. A handful will do.
    loss : callable
        Function of the model and a batch that returns the loss, a tensor of one number. It moves
        the batch to the device of the model, and has the ``autocast`` in it if you train with that.
    layers, overrides
        As in `gcx.torch.plan`.

    Returns
    -------
    EnergyReport
        One row per parameter, in the order of the plan.

    Raises
    ------
    TypeError
        If `loss` returns anything but a tensor of one number; if a weight to centralize has a
        sparse gradient; or as `gcx.torch.plan`.
    ValueError
        If there are no batches, or the loss does not depend on the parameters; or as
        `gcx.torch.plan`.
    RuntimeError
        If the model is spread over processes by FSDP or DistributedDataParallel, where gradients
        come by ``backward()`` alone; or as `gcx.torch.plan`.

    See Also
    --------
    gcx.diagnostics.energy_removed : for gradients that are there already.

    Notes
    -----
    Nothing is trained. Parameters, their ``.grad``, buffers (such as the running statistics of
    batch norm), the modes of the modules and the random number generators of torch on the CPU and
    on CUDA are afterwards what they were, after an exception too.

    It is the gradient of the loss that is measured, without the weight decay that an optimizer may
    add, as it comes from autograd: behind `gcx.torch.centralize_in_backward` nothing is left to be
    removed. Where a parameter has no gradient in some batches, the others count.

    Examples
    --------
    >>> import torch
    >>> import gcx.diagnostics.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> batches = [(torch.rand(32, 8), torch.rand(32, 2)) for _ in range(4)]
    >>> def loss(model, batch):
    ...     x, y = batch
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> report = gcx.diagnostics.torch.energy_removed(model, batches, loss)
    >>> [row.name for row in report.rows if row.share is not None]
    ['0.weight', '2.weight']
    """
    decisions = decide(model, Options(layers=layers, overrides=overrides))
    _check_not_spread(model)
    plan = plan_of(decisions)
    trained = {row: p for row, p in zip(plan, decisions, strict=True) if p.requires_grad}
    with _kept_as_it_is(model), torch.enable_grad():
        measured = [_energies(trained, loss(model, batch)) for batch in batches]
    return report_of([row if row in trained else _frozen(row) for row in plan], measured)


def _energies(trained: dict[PlanRow, Tensor], loss: Tensor) -> dict[str, Energy]:
    """Measure the gradients of a loss; parameters that it does not depend on are left out."""
    _check_loss(loss)
    # Not by backward(), which adds to .grad, and after which hooks may step an optimizer.
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        row.name: energy_of(_dense(grad, row), row)
        for row, grad in zip(trained, grads, strict=True)
        if grad is not None
    }


def _dense(grad: Tensor, row: PlanRow) -> Tensor:
    """Sparse gradients count in the total; what is to be centralized is never sparse."""
    is_sparse = grad.layout is not torch.strided
    return grad.to_dense() if is_sparse and row.layout is None else grad


def _frozen(row: PlanRow) -> PlanRow:
    return row._replace(reason=f"{row.reason}; requires_grad is False")


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.ndim:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        msg = f"loss(model, batch) is to return a tensor of one number, without axes; not {shape}"
        raise TypeError(msg)
    if not loss.requires_grad:
        msg = (
            "the loss does not depend on any parameter that requires a gradient, or was computed "
            "under torch.no_grad() or torch.inference_mode()"
        )
        raise ValueError(msg)


def _check_not_spread(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel) or any(map(is_dtensor, model.parameters())):
        msg = (
            "the model is spread over processes, where gradients come by backward() alone: give "
            "the model as it is before (model.module of DistributedDataParallel), or call "
            "backward() and give [{name: p.grad, ...}] to gcx.diagnostics.energy_removed, with "
            "layouts={row.name: row.layout for row in gcx.torch.plan(model)}"
        )
        raise RuntimeError(msg)


@contextmanager
def _kept_as_it_is(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes change: buffers, modes, random number generators.

    And gradients, should the loss call ``backward()`` itself.
    """
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, key, buffer)
        for module in model.modules()
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    # What is written to is a copy, the same one where modules share a buffer.
    copies = {buffer: buffer.detach().clone() for _, _, buffer in buffers}
    with _random_state_of(model):
        try:
            for parameter, _ in grads:
                parameter.grad = None
            for module, key, buffer in buffers:
                setattr(module, key, copies[buffer])
            yield
        finally:
            for parameter, grad in grads:
                parameter.grad = grad
            for module, key, buffer in buffers:
                setattr(module, key, buffer)
            for module, mode in modes:
                module.training = mode


def _random_state_of(model: nn.Module) -> AbstractContextManager[None]:
    """Keep the random number generators of the CPU and of the model's CUDA devices."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(devices, device_type="cuda")
