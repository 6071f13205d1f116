"""PyTorch: in place; on a GPU by its own clock, with a cold cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gcx
from benchmarks.throughput import cuda
from benchmarks.throughput.models import Weight
from benchmarks.throughput.setting import free_bytes_of_host
from benchmarks.throughput.timing import Call, host_clock, machine, waiting_clock
from benchmarks.throughput.workload import COPY, EXPRESSION, GCX, Workload
from gcx.__main__ import attempt

__all__ = [
    "device_name",
    "expression",
    "free_bytes",
    "gradients",
    "load_centralize_gradient",
    "peers",
    "release",
    "workload",
]


def workload(weights: Sequence[Weight], dtype: str, device: str, /) -> Workload:
    """See `benchmarks.throughput.workload.Library`."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # whose stream the events are on
    grads = gradients(weights, dtype, device)
    layouts = [weight.layout for weight in weights]
    source = torch.cat([grad.flatten() for grad in grads])
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        COPY: lambda: target.copy_(source),
        GCX: lambda: gcx.centralize_many(grads, layouts=layouts, out=grads),
        EXPRESSION: partial(expression, grads, [weight.axes for weight in weights]),
        **peers(grads, weights),
    }
    copied = 2 * source.nbytes
    match torch.device(device).type:
        case "cpu":
            return Workload(calls, copied)
        case "cuda":
            return Workload(
                calls,
                copied,
                clock=cuda.clock(device),
                host_clock=host_clock(cuda.wait),
                launches=lambda call: cuda.profiled(call).kernels,
            )
        case _:
            return Workload(calls, copied, clock=waiting_clock(_wait))


def _wait(_: object) -> None:
    torch.accelerator.synchronize()


def free_bytes(device: str, /) -> int:
    """See `benchmarks.throughput.workload.Library`."""
    if torch.device(device).type != "cuda":  # an accelerator without memory of its own, or the CPU
        return free_bytes_of_host()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def release() -> None:
    """See `benchmarks.throughput.workload.Library`."""
    torch.cuda.empty_cache()  # nothing where there is no CUDA


def device_name(device: str, /) -> str:
    """See `benchmarks.throughput.workload.Library`."""
    if torch.device(device).type != "cuda":
        return machine()
    name: str = torch.cuda.get_device_name(device)
    return name


def gradients(weights: Sequence[Weight], dtype: str, device: str) -> list[Tensor]:
    """Make one random gradient for each weight."""
    torch.manual_seed(0)
    return [torch.randn(w.shape, dtype=getattr(torch, dtype), device=device) for w in weights]


def expression(grads: Sequence[Tensor], axes: Sequence[tuple[int, ...]]) -> Sequence[Tensor]:
    """Centralize in place, as everybody writes it."""
    for grad, fan_in in zip(grads, axes, strict=True):
        grad.sub_(grad.mean(fan_in, keepdim=True))
    return grads


def peers(grads: Sequence[Tensor], weights: Sequence[Weight]) -> Mapping[str, Call]:
    """Other implementations that are installed, if they average over the same axes."""
    if any(weight.layout != "o..." for weight in weights):  # they know no other
        return {}
    centralize_gradient, _ = attempt(load_centralize_gradient)
    if centralize_gradient is None:
        return {}

    def centralize() -> Sequence[Tensor]:
        centralize_gradient([*grads])
        return grads

    return {"pytorch_optimizer": centralize}


def load_centralize_gradient() -> Any:
    """Import pytorch_optimizer's function for a list of gradients."""
    from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient

    return centralize_gradient
