"""The effect of Gradient Centralization on a torch model, before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gcx._options import Layers, Options
from gcx.backends._torch_dtensor import is_dtensor
from gcx.diagnostics._energy import Energy, measure_energies
from gcx.diagnostics._report import EnergyReport, make_report
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
    """Measure the share of the gradient's energy that GC removes, for each weight of a model.

    Parameters
    ----------
    model : torch.nn.Module
        On any device, of any dtype, in the mode to measure (``train()`` or ``eval()``).
    batches : iterable
        Batches for `loss`, read once. A handful is enough.
    loss : callable
        Function of the model and a batch that returns the loss, a tensor of one number. It must
        move the batch to the model's device, and use ``autocast`` if the training does.
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
        sparse gradient; or as in `gcx.torch.plan`.
    ValueError
        If there are no batches, or the loss does not depend on the parameters; or as in
        `gcx.torch.plan`.
    RuntimeError
        If FSDP or DistributedDataParallel wraps the model, since only ``backward()`` gives
        gradients then; or as in `gcx.torch.plan`.

    See Also
    --------
    gcx.diagnostics.energy_removed : the same for given gradients.

    Notes
    -----
    Nothing is trained. The model is restored afterwards, also after an exception: its parameters,
    gradients, buffers and modes, and torch's random number generators on the CPU and on CUDA.

    The gradient of the loss is measured as autograd computes it, without the weight decay that an
    optimizer may add. `gcx.torch.centralize_in_backward` leaves nothing to remove. Batches in which
    a parameter has no gradient do not count for it.

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
    with _restore(model), torch.enable_grad():
        measured = [_measure(trained, loss(model, batch)) for batch in batches]
    frozen = "; requires_grad is False"
    rows = [row if row in trained else row._replace(reason=row.reason + frozen) for row in plan]
    return make_report(rows, measured)


def _measure(trained: dict[PlanRow, Tensor], loss: Tensor) -> dict[str, Energy]:
    """Measure the gradients of a loss, for the parameters that it depends on."""
    _check_loss(loss)
    # backward() would add to .grad, and hooks after it might step an optimizer.
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return measure_energies(
        (row, grad if grad is None or row.layout is not None else grad.to_dense())
        for row, grad in zip(trained, grads, strict=True)
    )


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.ndim:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        msg = f"loss(model, batch) must return a tensor of one number, without axes; not {shape}"
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
            "the model is spread over processes, and only backward() gives its gradients: pass "
            "the model without its wrapper (model.module of DistributedDataParallel), or call "
            "backward() and pass [{name: p.grad, ...}] to gcx.diagnostics.energy_removed, with "
            "layouts=gcx.torch.plan(model)"
        )
        raise RuntimeError(msg)


@contextmanager
def _restore(model: nn.Module) -> Iterator[None]:
    """Restore the buffers, modes and random number generators that a forward pass changes.

    Gradients are restored too, since the loss may call ``backward()`` itself.
    """
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, key, buffer)
        for module in model.modules()
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    # Forward passes write to a copy. Modules that share a buffer share the copy.
    copies = {buffer: buffer.detach().clone() for _, _, buffer in buffers}
    with _fork_random_state(model):
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


def _fork_random_state(model: nn.Module) -> AbstractContextManager[None]:
    """Keep the random number generators of the CPU and of the model's CUDA devices."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(devices, device_type="cuda")
