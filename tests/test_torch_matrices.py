"""Weights as matrices: held against slices by hand, and against Muon on these slices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import gcx.torch
from gcx import Layout
from gcx.plan import LeaveAlone

Slices = Callable[[Tensor], list[Tensor]]


def flat(weight: Tensor) -> list[Tensor]:
    return [weight.flatten(1)]


def parts(count: int) -> Slices:
    return lambda weight: [part.flatten(1) for part in weight.chunk(count)]


def transposed(groups: int) -> Slices:
    return lambda weight: [part.transpose(0, 1).flatten(1) for part in weight.chunk(groups)]


class Stack(nn.Module):
    """A weight of its own, which overrides declare."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


CASES: dict[str, tuple[nn.Module, str, Layout | str | None, Slices]] = {
    "linear": (nn.Linear(6, 4), "weight", None, flat),
    "bilinear": (nn.Bilinear(3, 2, 4), "weight", None, flat),
    "conv": (nn.Conv2d(4, 6, 3), "weight", None, flat),
    "grouped conv": (nn.Conv1d(4, 6, 3, groups=2), "weight", None, parts(2)),
    "grouped conv, declared whole": (nn.Conv1d(4, 6, 3, groups=2), "weight", "o...", flat),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3), "weight", None, transposed(1)),
    "grouped transposed conv": (
        *(nn.ConvTranspose1d(4, 6, 3, groups=2), "weight", None, transposed(2)),
    ),
    "attention": (nn.MultiheadAttention(4, 2), "in_proj_weight", None, parts(3)),
    "attention key": (nn.MultiheadAttention(4, 2, kdim=6), "k_proj_weight", None, flat),
    "attention out": (nn.MultiheadAttention(4, 2), "out_proj.weight", None, flat),
    "lstm": (nn.LSTM(3, 4, proj_size=2), "weight_hh_l0", None, parts(4)),
    "lstm projection": (nn.LSTM(3, 4, proj_size=2), "weight_hr_l0", None, flat),
    "gru cell": (nn.GRUCell(3, 4), "weight_ih", None, parts(3)),
    "experts": (Stack(3, 5, 4), "weight", "bio", lambda w: [one.T for one in w]),
    "fused, input first": (
        *(Stack(4, 15), "weight", Layout("i(bo)", b=3)),
        lambda w: [one.T for one in w.chunk(3, dim=1)],
    ),
    "experts, fused": (
        *(Stack(2, 6, 4), "weight", Layout("b(bo)i", b=2)),
        lambda w: [part for one in w for part in one.chunk(2)],
    ),
    "heads": (Stack(6, 2, 3), "weight", "ioo", lambda w: [w.flatten(1).T]),
    "experts, flattened": (
        *(Stack(3, 20), "weight", Layout("b(oi...)", o=4), lambda w: [*w.reshape(3, 4, 5)]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_the_matrices_of_its_maps(case: str) -> None:
    model, name, layout, slices = CASES[case]
    found = gcx.torch.matrices(model, overrides=layout and {name: layout})
    weight = model.get_parameter(name).detach()
    matrices = found.split(name, weight)
    torch.testing.assert_close(matrices, torch.stack(slices(weight)), rtol=0, atol=0)
    assert torch.equal(found.join(name, matrices), weight)


def test_the_rest_has_its_reasons() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(9, 4),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4),
            "value": nn.Linear(4, 1),
            "dense": nn.Linear(4, 4),
            "head": nn.Linear(4, 9),
        }
    )
    found = gcx.torch.matrices(model, overrides={model["head"]: LeaveAlone("head")})
    assert [*found.weights] == ["dense.weight"]
    reasons = {name: found.plan[name].reason for name in found.rest if name.endswith("weight")}
    assert reasons == {
        "table.weight": "embedding: a row is an input, not an output unit",
        "depthwise.weight": "Conv1d, 4 maps: one output unit, so a vector",
        "value.weight": "Linear: one output unit, so a vector",
        "head.weight": "head",
    }


OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


@pytest.mark.parametrize("how", ["plain", "closure", "channels_last", "resumed"])
def test_muon_moves_each_matrix_as_one_of_its_own(how: str) -> None:
    torch.manual_seed(0)
    cases = [case for case in CASES.values() if case[2] is None]
    model = copy.deepcopy(nn.ModuleList([layer for layer, *_ in cases]))
    if how == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    weights = [model[k].get_parameter(name) for k, (_, name, *_) in enumerate(cases)]
    optimizer = gcx.torch.matrices(model).make_optimizer(torch.optim.Muon, **OPTIONS)

    def slices_of(tensors: Iterable[Tensor]) -> list[Tensor]:
        pairs = zip(cases, tensors, strict=True)
        return [part.clone() for (*_, slices), tensor in pairs for part in slices(tensor.detach())]

    twins = [*map(nn.Parameter, slices_of(weights))]
    reference = torch.optim.Muon(twins, **OPTIONS)
    for _ in range(4):
        if how == "resumed":
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = gcx.torch.matrices(model).make_optimizer(torch.optim.Muon, **OPTIONS)
            optimizer.load_state_dict(state)
        grads = [torch.randn_like(weight) for weight in weights]

        def backward(grads: list[Tensor] = grads) -> float:
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.clone() if weight.grad is None else weight.grad + grad
            return 1.0

        backward()
        for twin, grad in zip(twins, slices_of(grads), strict=True):
            twin.grad = grad
        reference.step()
        if how == "closure":
            optimizer.zero_grad()
            assert optimizer.step(backward) == 1.0
        else:
            optimizer.step()  # the gradients of the weights go with it
        for found, twin in zip(slices_of(weights), twins, strict=True):
            torch.testing.assert_close(found, twin.detach())


def test_a_weight_without_a_gradient_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model[0].requires_grad_(requires_grad=False)
    start = copy.deepcopy(model.state_dict())
    optimizer = gcx.torch.matrices(model).make_optimizer(torch.optim.Muon)
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    moved = [name for name, now in model.state_dict().items() if not torch.equal(now, start[name])]
    assert moved == ["1.weight"]


def test_an_optimizer_that_would_move_nothing_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    optimizer = gcx.torch.matrices(model).make_optimizer(torch.optim.Muon)
    model(torch.rand(2, 3)).sum().backward()
    optimizer.zero_grad()
    assert model[0].weight.grad is None
    with pytest.warns(UserWarning, match="the copy of this Muon moves no weights"):
        copy.deepcopy((model, optimizer))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced in the model"):
        optimizer.step()


def test_a_sharded_weight_is_named() -> None:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 4))
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        with pytest.raises(TypeError, match=r"0\.weight is a DTensor"):
            gcx.torch.matrices(model).make_optimizer(torch.optim.Muon)
    finally:
        distributed.destroy_process_group()
