"""What type checkers see of the public names: ``nox -s typing`` reads it, nothing runs it.

Where a line is marked as an error, both checkers complain if it is none.
"""

from __future__ import annotations

from typing import Any, assert_type

import jax
import numpy as np
import numpy.typing as npt
import optax
import torch

import gcx
import gcx.diagnostics
import gcx.optax
import gcx.optim
import gcx.torch
from gcx.plan import Plan, PlanRow

Floats = npt.NDArray[np.float32]


def same_type_comes_out(grad: Floats, tensor: torch.Tensor, array: jax.Array) -> None:
    assert_type(gcx.centralize(grad), Floats)
    assert_type(gcx.centralize(tensor, layout="io...", out=tensor), torch.Tensor)
    assert_type(gcx.centralize(array, axis=(0, 1), strength=0.9), jax.Array)
    assert_type(gcx.centralize_many([grad], layouts=["o..."]), list[Floats])
    assert_type(gcx.centralize_many({"a": tensor}, layouts={"*": None}), dict[str, torch.Tensor])


def layouts() -> None:
    assert_type(gcx.Layout("o...").fan_in_axes(2), tuple[int, ...])
    gcx.Layout(2)  # type: ignore[arg-type]


def options_are_named(grad: Floats, tensor: torch.Tensor) -> None:
    gcx.centralize(grad, "o...")  # type: ignore[call-arg]
    gcx.centralize(grad, layuot="o...")  # type: ignore[call-arg]
    gcx.centralize(grad, strength="1")  # type: ignore[arg-type]


def optimizers(params: dict[str, Floats]) -> None:
    optimizer = gcx.optim.SGD(0.1, momentum=0.9)
    state = optimizer.init(params)
    assert_type(optimizer.update(params, params, state), tuple[dict[str, Floats], dict[str, Any]])
    gcx.optim.AdamW(where="gradients")  # type: ignore[arg-type]


def adapters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    handle = gcx.torch.centralize(optimizer, model, where="update", decay="outside")
    assert_type(handle, gcx.torch.GradientCentralization)
    muon = gcx.torch.matrices(model).make_optimizer(torch.optim.Muon, lr=0.02)
    assert_type(muon, torch.optim.Muon)
    assert_type(handle.plan, Plan)
    gcx.torch.centralize(optimizer, model, where="updates")  # type: ignore[arg-type]

    assert_type(gcx.optax.centralize("flax"), optax.GradientTransformation)
    gcx.optax.centralize()  # type: ignore[call-arg]


def plans(plan: Plan) -> None:
    assert_type(plan[0], PlanRow)
    assert_type(plan[0].layout, gcx.Layout | None)
    assert_type([row.reason for row in plan], list[str])


def diagnostics(plan: Plan, x: torch.Tensor) -> None:
    report = gcx.diagnostics.energy_removed([[x]], layouts=plan)
    assert_type(report, gcx.diagnostics.EnergyReport)
    assert_type(report.shares["0"], gcx.diagnostics.Share)
