"""The fan-in that a layer declares, held against what autograd says it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

import gcx.torch
from gcx._options import Options
from gcx.layout import Layout
from gcx.torch._layers import TORCH_NN
from gcx.torch._plan import decide


def declared_layout(model: nn.Module, name: str) -> Layout:
    """Layout by which gcx centralizes a parameter; an error if it is left alone."""
    row = gcx.torch.plan(model)[name]
    assert row.layout is not None, row.reason
    return row.layout


def assert_fan_in_is_support(
    model: nn.Module, outputs: Tensor, name: str, units_per_output: int = 1
) -> None:
    """Check that an output depends on all elements of its own output units, and on no others.

    `outputs` holds one number for each output; `units_per_output` output units of the weight enter
    into each, more than one where gates or projections are stacked.
    """
    weight = model.get_parameter(name)
    shape, axes = declared_layout(model, name).split(weight.shape)
    units = _output_units(shape, axes)
    seen: set[int] = set()
    for output in outputs:
        (grad,) = torch.autograd.grad(output, weight, retain_graph=True)
        depends = grad.reshape(shape) != 0
        touched = set(units[depends].tolist())
        assert len(touched) == units_per_output
        assert depends[torch.isin(units, torch.tensor(sorted(touched)))].all()
        assert not touched & seen
        seen |= touched


def _output_units(shape: tuple[int, ...], fan_in: tuple[int, ...]) -> Tensor:
    """Number each element of a weight by the output unit it belongs to."""
    kept = [1 if axis in fan_in else n for axis, n in enumerate(shape)]
    return torch.arange(torch.Size(kept).numel()).reshape(kept).expand(shape)


def features(output: Tensor) -> Tensor:
    """Sum an output (..., features) to one number for each feature."""
    return output.flatten(0, -2).sum(0)


def channels(output: Tensor) -> Tensor:
    """Sum an output (batch, channels, ...) to one number for each channel."""
    return output.transpose(0, 1).flatten(1).sum(1)


def centralized_outside_of_torch(model: nn.Module) -> dict[str, str]:
    """Layouts of the weights that are centralized in layers which torch.nn knows nothing of."""
    of_torch = (*TORCH_NN, ParametrizationList)
    return {
        f"{type(d.holder).__name__}.{d.key}": str(d.row.layout)
        for d in decide(model, Options()).values()
        if d.row.layout is not None and not isinstance(d.holder, of_torch)
    }


def unknown_in(model: nn.Module) -> list[str]:
    """Names of the parameters that nobody has declared."""
    return [row.name for row in gcx.torch.plan(model) if row.reason.startswith("unknown")]
