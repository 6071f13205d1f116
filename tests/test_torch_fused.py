"""gcx.torch.AdamW and SGD: what torch's do with gcx.torch.centralize.

To the last bit on a CPU, and up to rounding with kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import gcx.torch
from gcx.torch import SGD, AdamW

from copies import COPIES, saved_by_torch
from fused_training import OPTIONS, STEPS, TRAININGS, TYPICAL, backward, new_model, train
from torch_kernels import BASES, Device, hooked
from torch_kernels import make_device_for_steps as make_device
from torch_training import GRAD

Pair = tuple[nn.Sequential, Optimizer]


def both(kind: Any, **options: Any) -> tuple[Pair, Pair]:
    model, twin = new_model(), new_model()
    return (model, kind(model, **options)), (twin, hooked(twin, kind, **options))


@pytest.fixture(params=[None, "emulated"], ids=["torch", "kernels"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels make the steps, or torch does."""
    device = request.param and make_device(request.param, monkeypatch)

    def count(optimizer: Optimizer, *_: Any) -> None:
        if device and isinstance(optimizer, (AdamW, SGD)):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            device.due += sum(grad is not None and not grad.is_sparse for grad in grads)

    hook = register_optimizer_step_post_hook(count)
    yield device
    hook.remove()


def assert_same(one: Pair, other: Pair, device: Device | None = None, left: Any = ()) -> None:
    """Compare the parameters, and all that the optimizers remember."""
    (found, state), (expected, expected_state) = (
        ([*model.parameters()], optimizer.state_dict()) for model, optimizer in (one, other)
    )
    assert state["param_groups"] == expected_state["param_groups"]
    close = {"rtol": 1e-9, "atol": 1e-12} if device else {"rtol": 0.0, "atol": 0.0}
    pairs = (found, expected), (state["state"], expected_state["state"])
    for one_part, other_part in pairs:
        torch.testing.assert_close(one_part, other_part, check_stride=True, **close)
    if device is not None:
        assert device.total == (0 if left else device.due)


@pytest.fixture(params=TYPICAL)
def typical(request: pytest.FixtureRequest) -> Any:
    """Makes an optimizer for a model or parameters."""
    kind, options = TYPICAL[request.param]
    return partial(kind, **{"lr": 0.01, **options})


@pytest.mark.parametrize(("training", "case"), TRAININGS)
def test_same_as_torch_with_hooks(
    training: Callable[..., None], case: str, device: Device | None
) -> None:
    kind, options = {**OPTIONS, **TYPICAL}[case]
    pairs = both(kind, **{"lr": 0.01, **options})
    for pair in pairs:
        training(*pair)
    assert_same(*pairs, device, options.keys() & {"amsgrad", "foreach", "fused", "lr"})
    if device is not None:
        return  # a kernel does not write to the gradients
    found, expected = ([p.grad for p in model.parameters()] for model, _ in pairs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", BASES)
def test_same_arguments_as_torch(kind: Any) -> None:
    found, expected = (signature(each).parameters for each in (kind, BASES[kind]))
    assert [*found] == [*expected, "model", "strength", "layers", "overrides", "reproducible"]
    for name, parameter in expected.items():
        assert (found[name].default, found[name].kind) == (parameter.default, parameter.kind)


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": model[0].parameters(), "lr": 0.02},
        {"params": [*model[2].parameters(), *model[3].parameters()], "weight_decay": 0.0},
        {"params": model[6].parameters(), "centralize": False},
    ]


@pytest.mark.parametrize("kind", BASES)
def test_parameter_groups(kind: Any, device: Device | None) -> None:
    model, twin = new_model(), new_model()
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = kind(groups_of(model), model=model, **options)
    assert [row.name for row in optimizer.plan if row.layout] == ["0.weight", "3.weight"]
    assert optimizer.plan[-2].reason.startswith("switched off")
    pairs = (model, optimizer), (twin, hooked(twin, kind, groups_of(twin), **options))
    for pair in pairs:
        train(*pair)
    assert_same(*pairs, device)


def test_parameters_named_and_given_beside_the_model(typical: Any) -> None:
    model, twin = new_model(), new_model()
    named = typical(model.named_parameters(), model=model)
    part = typical(twin[6], model=twin)
    assert named.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert [row.name for row in part.plan] == ["6.weight", "6.bias"]
    assert str(named.plan) == str(typical(model).plan) == str(gcx.torch.plan(model))


def test_layers_and_overrides(typical: Any) -> None:
    model = new_model()
    conv = typical(model, layers="conv")
    assert [row.name for row in conv.plan if row.layout] == ["0.weight", "3.weight"]
    given = typical(model, overrides={"0.*": None, "6.weight": "io"})
    assert [str(row.layout) for row in given.plan if row.layout] == ["(bi)o...", "io"]


def test_group_added_later_and_layer_unfrozen(typical: Any, device: Device | None) -> None:
    pairs = []
    for make in (typical, partial(hooked, kind=typical.func, **typical.keywords)):
        model = new_model()
        model[0].requires_grad_(requires_grad=False)
        first = [*model[0].parameters(), *model[3].parameters()]
        optimizer = make(first, model=model) if make is typical else make(model, groups=first)
        train(model, optimizer)
        optimizer.add_param_group({"params": model[6].parameters(), "lr": 0.02})
        model[0].requires_grad_()
        train(model, optimizer)
        pairs.append((model, optimizer))
    assert_same(*pairs, device)


def test_sparse_gradient_of_an_embedding(device: Device | None) -> None:
    model = nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(model)
    pairs = (model, SGD(model, lr=0.1)), (twin, hooked(twin, SGD, lr=0.1))
    for _ in range(STEPS):
        for each, optimizer in pairs:
            optimizer.zero_grad()
            each(torch.tensor([1, 2])).square().sum().backward()
            optimizer.step()
    assert_same(*pairs, device)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_compiled_step(typical: Any) -> None:
    one, other = ((model, typical(model)) for model in (new_model(), new_model()))
    step = torch.compile(one[1].step, backend="aot_eager")
    for _ in range(STEPS):
        backward(*one)
        step()
    torch.compiler.reset()
    train(*other)
    assert_same(one, other)


def resumed(pair: Pair, make: Callable[[nn.Module], Optimizer]) -> Pair:
    """Go on from a file, as checkpoints go."""
    model = copy.deepcopy(pair[0])
    optimizer = make(model)
    optimizer.load_state_dict(saved_by_torch(pair[1].state_dict(), weights_only=True))
    return model, optimizer


@pytest.mark.parametrize("into", ["ours", "torch"])
def test_checkpoint_of_ours_resumes(into: str, typical: Any, device: Device | None) -> None:
    """It goes on as from a checkpoint of torch with hooks; in torch without centralization."""
    kind = typical.func
    makes = (typical, lambda model: hooked(model, kind))
    if into == "torch":
        makes = (lambda model: BASES[kind](model.parameters()),) * 2
    pairs = []
    for pair, make in zip(both(kind, **typical.keywords), makes, strict=True):
        train(*pair)
        pairs.append(resumed(pair, make))
        train(*pairs[-1])
    assert_same(*pairs, device)


def test_checkpoint_of_torch_resumes_in_ours(typical: Any, device: Device | None) -> None:
    """Its momentum is treated as `centralize` treats it."""
    model = new_model()
    pair = (model, BASES[typical.func](model.parameters(), **typical.keywords))
    train(*pair)
    pairs = []
    for make in (typical, lambda model: hooked(model, typical.func)):
        with pytest.warns(UserWarning, match="momentum of 3 weights") as caught:
            pairs.append(resumed(pair, make))
        assert caught[0].filename == __file__
        train(*pairs[-1])
    assert_same(*pairs, device)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_copies_of_a_model_that_holds_its_optimizer(
    first: str, how: str, typical: Any, device: Device | None
) -> None:
    model: Any = new_model()
    model.optimizer = typical(model)
    train(model, model.optimizer)
    pair = (model, model.optimizer) if first == "model" else (model.optimizer, model)
    twin = next(each for each in COPIES[how](pair) if isinstance(each, nn.Module))
    for each in (model, twin):
        train(each, each.optimizer)
    assert_same((twin, twin.optimizer), (model, model.optimizer), device)
    assert twin.optimizer.fallbacks == model.optimizer.fallbacks


def test_hooks_of_others_are_not_copied(typical: Any) -> None:
    """As with any torch optimizer."""
    model = new_model()
    optimizer = typical(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for pair in ((model, optimizer), copy.deepcopy((model, optimizer))):
        train(*pair, steps=1)
        assert calls == ["before", "after"]


def test_repr_shows_options_plan_and_who_steps() -> None:
    (_, optimizer), (_, reference) = both(SGD, lr=0.01, foreach=False)
    assert repr(optimizer) == (
        repr(reference).removesuffix(")") + "Gradient Centralization\n"
        "    plan: <gcx plan: 3 of 8 parameters centralized>\n"
        f"    step of group 0: by torch ({optimizer.fallbacks[0]})\n)"
    )


def test_models_and_options_that_are_refused(typical: Any) -> None:
    model = new_model()
    for params in (model.parameters(), list(model.parameters()), groups_of(model)):
        with pytest.raises(TypeError, match=r"do not say where their fan-in is.*model="):
            typical(params)
    with pytest.raises(TypeError, match=r"model is a torch\.nn\.Module, not list"):
        typical(model.parameters(), model=[model])
    with pytest.raises(RuntimeError, match="that is not in the model"):
        typical(model.parameters(), model=model[0])
    with pytest.raises(ValueError, match="Invalid learning rate"):
        typical(model, lr=-1.0)


def test_errors_of_a_step_come_before_anything_is_changed(
    typical: Any, device: Device | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3).double(), nn.Linear(5, 3).double())
    optimizer = typical([{"params": layer.parameters()} for layer in model], model=model)
    before = copy.deepcopy(model.state_dict())
    model[0].weight.grad, model[1].weight.grad = GRAD.clone(), GRAD.to_sparse()
    with pytest.raises(TypeError, match=r"1\.weight has a gradient of layout torch\.sparse_coo"):
        optimizer.step()
    model[1].weight.grad = None
    optimizer.add_param_group({"params": nn.Linear(4, 3).parameters()})
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\) that is not in the model"):
        optimizer.step()
    assert torch.equal(model[0].weight.grad, GRAD)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.load_state_dict(before, assign=True)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced in the model"):
        optimizer.step()
    if device is not None:
        assert not device.runs
        assert "0.weight was replaced in the model" in optimizer.fallbacks[0]
