"""`gcx.diagnostics.torch`: the gradients that training would have, and a model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gcx.diagnostics
import gcx.torch
from gcx.diagnostics.torch import energy_removed

from reference import fan_in_means


class Net(nn.Module):
    """Of each kind something: groups, batch norm, dropout, an embedding, what nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 12)
        self.conv = nn.Conv1d(3, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.up = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids).unflatten(1, (3, 4))
        return self.head(self.dropout(self.up(self.norm(self.conv(x)).relu())).flatten(1))


# The fan-in of each weight with a share.
FAN_IN = {"conv.weight": 9, "up.weight": 6, "head.weight": 12}


def new_net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def new_batches(count: int = 3, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(7, (size,), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    return nn.functional.cross_entropy(output, ids % output.shape[1])


def share(report: gcx.diagnostics.EnergyReport, name: str) -> gcx.diagnostics.Share:
    found = {row.name: row.share for row in report.rows}[name]
    assert found is not None
    return found


def shared(report: gcx.diagnostics.EnergyReport) -> list[str]:
    """Names of the parameters that have a share."""
    return [row.name for row in report.rows if row.share]


def reason(report: gcx.diagnostics.EnergyReport, name: str) -> str:
    return {row.name: row.reason for row in report.rows}[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shares_are_those_of_the_gradients_of_backward(dtype: torch.dtype) -> None:
    model, batches = new_net(dtype), new_batches()
    torch.manual_seed(5)  # for dropout
    report = energy_removed(model, batches, loss_of)
    torch.manual_seed(5)
    seen = []
    for ids in batches:
        model.zero_grad()
        loss_of(model, ids).backward()
        seen.append({n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None})
    expected = gcx.diagnostics.energy_removed(seen, layouts=gcx.torch.plan(model))
    for name, fan_in in FAN_IN.items():
        found = share(report, name)
        assert found == pytest.approx(share(expected, name), rel=1e-12)
        assert found.lowest < found.removed < found.highest
        assert found.by_chance == pytest.approx(1 / fan_in)
    assert report.total == pytest.approx(expected.total, rel=1e-12)
    assert report.batches == 3


def test_of_one_sample_it_is_the_angle_between_the_input_and_the_ones() -> None:
    """As the documentation derives it."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4).double(), torch.randn(1, 6, dtype=torch.float64)
    cosine = float(x.sum() / (x.norm() * 6**0.5))
    report = energy_removed(layer, [x], loss_of_squares)
    assert share(report, "weight").removed == pytest.approx(cosine**2, rel=1e-12)


def test_rows_are_those_of_the_plan() -> None:
    model, batches = new_net(), new_batches()
    report, plan = energy_removed(model, batches, loss_of), gcx.torch.plan(model)
    assert [row[:3] for row in report.rows] == [row[:3] for row in plan]
    assert shared(report) == list(FAN_IN)
    assert reason(report, "tokens.weight") == "embedding: a row is an input, not an output unit"
    assert reason(report, "unused.weight") == "Linear; no gradient"
    assert reason(report, "up.weight") == "ConvTranspose1d, 2 groups"
    report = energy_removed(model, batches, loss_of, layers="conv")
    assert shared(report) == ["conv.weight", "up.weight"]
    report = energy_removed(model, batches, loss_of, overrides={"conv.*": None, "tokens.*": "o..."})
    assert shared(report) == ["tokens.weight", "up.weight", "head.weight"]
    model.conv.requires_grad_(requires_grad=False)
    report = energy_removed(model, batches, loss_of)
    assert reason(report, "conv.weight") == "Conv1d; requires_grad is False; no gradient"
    assert reason(report, "conv.bias") == "bias; requires_grad is False"
    assert shared(report) == ["up.weight", "head.weight"]


def loss_of_squares(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).abs().square().mean()


def test_shared_and_tied_parameters_count_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    report = energy_removed(nn.Sequential(layer, nn.ReLU(), layer), [x], loss_of_squares)
    (row,) = report.rows
    assert (row.name, report.total) == ("0.weight", row.share)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    (row,) = energy_removed(model, [torch.arange(5)], loss_of).rows
    assert row.share is None
    assert row.reason.startswith("tied, and the rules differ")


def test_a_sparse_gradient_counts_in_the_total() -> None:
    dense, sparse = new_net(), new_net()
    sparse.tokens.sparse = True
    torch.manual_seed(3)
    expected = energy_removed(dense, new_batches(), loss_of)
    torch.manual_seed(3)
    found = energy_removed(sparse, new_batches(), loss_of)
    assert found.rows == expected.rows
    assert found.total == pytest.approx(expected.total, rel=1e-12)
    with pytest.raises(TypeError, match=r"tokens.weight: expected a dense tensor"):
        energy_removed(sparse, new_batches(), loss_of, overrides={"tokens.weight": "o..."})


def test_complex_weights_and_what_is_not_finite() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, dtype=torch.complex64)
    x = torch.randn(4, 3, dtype=torch.complex64)
    report = energy_removed(layer, [x], loss_of_squares)
    loss_of_squares(layer, x).backward()
    assert layer.weight.grad is not None
    grad = layer.weight.grad.numpy().astype(complex)
    expected = 3 * np.sum(np.abs(fan_in_means(grad, (1,))) ** 2) / np.sum(np.abs(grad) ** 2)
    assert share(report, "weight").removed == pytest.approx(expected, rel=1e-12)
    batches = [torch.ones(1, 3), torch.full((1, 3), torch.inf)]
    report = energy_removed(nn.Linear(3, 2), batches, loss_of_squares)
    assert reason(report, "weight") == "Linear; NaN or infinity in the gradient of 1 of 2 batches"
    assert report.total is None


def everything(model: nn.Module) -> dict[str, Any]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters()}
    return {**state, **grads, "random": torch.get_rng_state()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value is other[name] or torch.equal(value, other[name]), name


def interrupted(model: nn.Module, ids: Tensor) -> Tensor:
    model.eval()
    loss_of(model, ids)
    raise KeyboardInterrupt


def backward_by_mistake(model: nn.Module, ids: Tensor) -> Tensor:
    loss = loss_of(model, ids)
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("loss", "ending"),
    [
        (loss_of, nullcontext()),
        (interrupted, pytest.raises(KeyboardInterrupt)),
        (backward_by_mistake, pytest.raises(RuntimeError, match="backward through the graph")),
    ],
)
def test_nothing_is_changed(
    loss: Callable[..., Tensor], ending: AbstractContextManager[object]
) -> None:
    model = new_net()
    model.norm.num_batches_tracked.fill_(7)
    model.unused.eval()
    loss_of(model, new_batches(1)[0]).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    before, buffers = everything(model), dict(model.named_buffers())
    kept = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
    modes = [module.training for module in model.modules()]
    batches = torch.utils.data.DataLoader(torch.arange(16) % 7, batch_size=8, shuffle=True)
    with ending:
        energy_removed(model, batches, loss)
    assert_same(everything(model), before)
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
    assert_same({n: p.grad for n, p in model.named_parameters()}, kept)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    loss_of(model.train(), torch.arange(7))  # which would change something
    with pytest.raises(AssertionError, match=r"norm\.running_mean"):
        assert_same(everything(model), before)


def test_a_shared_buffer_stays_shared() -> None:
    class Counter(nn.Module):
        def __init__(self, count: Tensor) -> None:
            super().__init__()
            self.register_buffer("count", count)

    count = torch.zeros(())
    model = nn.Sequential(nn.Linear(2, 2), Counter(count), Counter(count))

    def loss(model: Any, x: Tensor) -> Tensor:
        model[1].count += 1
        assert model[2].count == model[1].count
        return model[0](x).sum()

    energy_removed(model, [torch.ones(1, 2)], loss)
    assert model[1].count is model[2].count is count
    assert count == 0


def test_no_hook_of_training_runs() -> None:
    model = new_net()
    plain = copy.deepcopy(model)
    gcx.torch.centralize(torch.optim.SGD(model.parameters(), lr=1.0), model)
    called = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    reports = []
    for one in (model, plain):
        torch.manual_seed(0)
        reports.append(energy_removed(one, new_batches(), loss_of))
    assert reports[0] == reports[1]
    assert called == []


def test_a_generator_and_batches_of_any_kind_under_no_grad() -> None:
    def batches() -> Iterator[dict[str, Any]]:
        for ids in new_batches():
            yield {"ids": ids, "name": "a text"}

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        assert not model.training  # the mode of the model is that of the measurement
        return loss_of(model, batch["ids"])

    with torch.no_grad():
        model = new_net().eval()
        report = energy_removed(model, batches(), loss)
        assert not torch.is_grad_enabled()
    assert report == energy_removed(new_net().eval(), new_batches(), loss_of)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: y, r"one number, without axes; not a tensor of shape \(8, 3\)"),
        (lambda y: y.sum()[None], r"not a tensor of shape \(1,\)"),
        (lambda y: {"loss": y.sum()}, r"not \{'loss': tensor"),
        (lambda y: float(y.detach().sum()), r"not -?\d"),
    ],
)
def test_a_loss_that_is_no_number(output: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        energy_removed(new_net(), new_batches(), lambda model, ids: output(model(ids)))


def test_errors() -> None:
    model, batches = new_net(), new_batches()
    for criterion, name in ((nn.MSELoss(), "MSELoss"), (nn.functional.mse_loss, "mse_loss")):
        with pytest.raises(TypeError, match=rf"of the model and a batch, and {name} compares"):
            energy_removed(model, batches, criterion)
    with pytest.raises(ValueError, match="batches is empty"):
        energy_removed(model, [], loss_of)
    with pytest.raises(ValueError, match="the loss does not depend on any parameter"):
        energy_removed(model, batches, lambda m, ids: loss_of(m, ids).detach())
    elsewhere = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="no parameter has a gradient in any batch"):
        energy_removed(model, batches, lambda _model, _ids: 2 * elsewhere)
    model.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="the loss does not depend on any parameter"):
        energy_removed(model, batches, loss_of)
    parameters: Any = list(model.parameters())
    with pytest.raises(TypeError, match=r"model is a torch.nn.Module, not list"):
        energy_removed(parameters, batches, loss_of)
