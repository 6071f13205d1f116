"""Gradients centralized in backward, wherever the weights are kept and however they are used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp import ShardingStrategy as Strategy
from torch.func import grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

import gcx.torch
from gcx.testing import assert_centralized

import processes
from sharded_training import Weights, assert_weights, whole_weights
from torch_training import SEQUENCES as X

STEPS = 4


class Attention(nn.Module):
    """Uses the weights of two of its layers without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mix = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.out(nn.functional.linear(x, self.mix.weight).tanh())


class Model(nn.Module):
    """A block in a checkpoint or not, and a layer that is called twice."""

    def __init__(self, **checkpointing: bool) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.block = Attention()
        self.last = parametrizations.weight_norm(nn.Linear(6, 4))
        self._checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).tanh())
        options = self._checkpointing
        return self.last(checkpoint(self.block, x, **options) if options else self.block(x))


def built(**checkpointing: bool) -> Model:
    torch.manual_seed(0)
    return Model(**checkpointing).double()


def backward(model: nn.Module, part: int = 0, parts: int = 1) -> None:
    (model(X[part::parts]) - 1).square().mean().backward()


sgd = partial(SGD, lr=0.1, momentum=0.9)


def loss_of(layer: nn.Module) -> Tensor:
    return layer(X.float()).square().sum()


def train(model: nn.Module, optimizer: Optimizer, part: int = 0, parts: int = 1) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model, part, parts)
        optimizer.step()


@pytest.fixture(scope="module")
def expected() -> Weights:
    """What centralizing at the step comes to."""
    model = built()
    optimizer = sgd(model.parameters())
    gcx.torch.centralize(optimizer, model)
    train(model, optimizer)
    return whole_weights(model)


PLAIN, REENTRANT, NOT_REENTRANT = {}, {"use_reentrant": True}, {"use_reentrant": False}


@pytest.mark.parametrize("checkpointing", [PLAIN, REENTRANT, NOT_REENTRANT])
def test_as_at_the_step(checkpointing: Any, expected: Weights) -> None:
    model = built(**checkpointing)
    gcx.torch.centralize_in_backward(model)
    train(model, sgd(model.parameters()))
    assert_weights(whole_weights(model), expected)
    weights = [p for p in model.block.parameters() if p.ndim == 2]
    assert [len(p._backward_hooks or ()) for p in weights] == [1] * 4  # they do not pile up


def test_accumulated_gradients() -> None:
    model, plain = built(), built()
    gcx.torch.centralize_in_backward(model)
    for each in (model, plain):
        for part in range(4):
            backward(each, part, 4)
    gcx.torch.centralize_grads_(plain)
    grads = ([p.grad for p in each.parameters()] for each in (model, plain))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)


def test_optimizer_in_backward(expected: Weights) -> None:
    model = built()
    gcx.torch.centralize_in_backward(model)
    optimizers = {p: sgd([p]) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(STEPS):
        backward(model)
    assert_weights(whole_weights(model), expected)


def test_gradients_of_autograd() -> None:
    layer = nn.Linear(6, 4)
    gcx.torch.centralize_in_backward(layer)
    (first,) = torch.autograd.grad(loss_of(layer), layer.weight, create_graph=True)
    assert_centralized(first)
    (second,) = torch.autograd.grad(first.square().sum(), layer.weight)
    assert second.abs().max() > 0


def test_parameter_that_is_replaced_or_unfrozen_is_found_in_the_next_pass() -> None:
    layer = nn.Linear(6, 4)
    layer.weight.requires_grad_(False)
    gcx.torch.centralize_in_backward(layer)
    layer.weight.requires_grad_(True)
    for state in (None, nn.Linear(6, 4).state_dict()):
        if state is not None:
            layer.load_state_dict(state, assign=True)
        loss_of(layer).backward()
        assert_centralized(layer.weight.grad)


BY_FUNC: dict[str, Callable[..., Any]] = {
    "grad": lambda loss, weights: grad(loss)(weights, X),
    "per example": lambda loss, weights: vmap(grad(loss), (None, 0))(weights, X),
    "ensemble": lambda loss, weights: vmap(grad(loss), (0, None))(
        {name: torch.stack([weight, -weight]) for name, weight in weights.items()}, X
    ),
}


@pytest.mark.parametrize("differentiate", BY_FUNC.values(), ids=BY_FUNC)
def test_gradients_of_torch_func(differentiate: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = differentiate(loss, weights)
    handle = gcx.torch.centralize_in_backward(model)
    found = differentiate(loss, weights)
    handle.remove()
    for name, whole in expected.items():
        mean = whole.mean(-1, keepdim=True) if "weight" in name else 0.0
        torch.testing.assert_close(found[name], whole - mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_model(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Linear(6, 4)
    handle = gcx.torch.centralize_in_backward(model)
    loss_of(model).backward()
    twin = copied(model)
    handle.remove()
    for each in (model, twin):
        each.zero_grad()
        loss_of(each).backward()
    assert_centralized(twin.weight.grad)
    assert model.weight.grad.mean(1).abs().max() > 0.01


def test_handle() -> None:
    model, plain, overrides = built(), built(), {"last.*": None}
    handle = gcx.torch.centralize_in_backward(model, overrides=overrides)
    assert isinstance(handle, gcx.torch.CentralizationInBackward)
    assert handle.plan == gcx.torch.plan(model, overrides=overrides)
    assert repr(handle) == f"<CentralizationInBackward of Model, {handle.plan!r}>"
    with pytest.raises(ValueError, match="this Model is centralized in backward already"):
        gcx.torch.centralize_in_backward(model)
    backward(model)
    handle.remove()
    handle.remove()
    for each in (model, plain):
        train(each, sgd(each.parameters()))
    assert_weights(whole_weights(model), whole_weights(plain), atol=0)
    gcx.torch.centralize_in_backward(model)  # which a second handle would refuse


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    gcx.torch.centralize_in_backward(model)
    torch.compiler.reset()
    loss_of(torch.compile(model, backend="aot_eager")).backward()
    assert_centralized(model[0].weight.grad)
    assert_centralized(model[2].weight.grad)


def test_models_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to centralize in this LayerNorm:\n.*\nweight "):
        gcx.torch.centralize_in_backward(nn.LayerNorm(3))
    unknown = nn.ParameterDict({"mine": torch.zeros(3, 4)})
    told = r"ParameterDict\.mine\n.*\n.*register_layer or overrides can tell"
    with pytest.raises(ValueError, match=told):
        gcx.torch.centralize_in_backward(unknown)
    table = nn.Embedding(5, 3, sparse=True)
    gcx.torch.centralize_in_backward(table, overrides={table: "oi"})
    with pytest.raises(TypeError, match=r"weight: expected a dense tensor"):
        table(torch.tensor([1, 2])).sum().backward()


CPU = {"device_id": torch.device("cpu")}


def under_fsdp1(
    checkpointing: Any, is_nested: bool, strategy: Any, use_orig_params: bool, micro_steps: int = 1
) -> Weights:
    options = {"use_orig_params": use_orig_params, "sharding_strategy": strategy, **CPU}
    rank = distributed.get_rank()
    model = built(**checkpointing)
    gcx.torch.centralize_in_backward(model)
    if is_nested:
        model.block = FullyShardedDataParallel(model.block, **options)
        model.last = FullyShardedDataParallel(model.last, **options)
    wrapped = FullyShardedDataParallel(model, **options)
    optimizer = sgd(wrapped.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        if micro_steps == 1:
            backward(wrapped, rank, 2)
        else:
            with wrapped.no_sync():
                backward(wrapped, rank, 4)
            backward(wrapped, rank + 2, 4)
            for p in wrapped.parameters():
                p.grad = None if p.grad is None else p.grad / 2
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        named = wrapped.named_parameters()
        return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in named}


FSDP1 = {
    "one": (PLAIN, False, Strategy.FULL_SHARD),
    "nested": (PLAIN, True, Strategy.FULL_SHARD),
    "grads": (PLAIN, True, Strategy.SHARD_GRAD_OP),
    "no-shard": (PLAIN, False, Strategy.NO_SHARD),
    "reentrant": (REENTRANT, True, Strategy.FULL_SHARD),
    "not-reentrant": (NOT_REENTRANT, True, Strategy.FULL_SHARD),
}
OF_ONE_PROCESS: dict[str, tuple[Any, ...]] = {
    **{f"{k}, {o}": (under_fsdp1, *case, o) for k, case in FSDP1.items() for o in (False, True)},
    "accumulating": (under_fsdp1, *FSDP1["nested"], False, 2),
}


def change_under_fsdp1_in_mixed_precision() -> Tensor:
    layer = nn.Linear(64, 4)
    start = layer.weight.detach().clone()
    gcx.torch.centralize_in_backward(layer)
    mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = FullyShardedDataParallel(layer, mixed_precision=mixed, use_orig_params=True, **CPU)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.rand(8, 64, generator=torch.Generator().manual_seed(step))
        model(x).float().square().mean().backward()
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        return layer.weight.detach() - start


def test_fsdp1_in_mixed_precision() -> None:
    for change in processes.run(2, change_under_fsdp1_in_mixed_precision):
        # Each gradient is rounded to bfloat16 once, after its mean was taken off.
        assert_centralized(change, rtol=torch.finfo(torch.bfloat16).eps / 2)


def under_ddp() -> Weights:
    model = built()
    gcx.torch.centralize_in_backward(model)
    wrapped = DistributedDataParallel(model)
    train(wrapped, sgd(wrapped.parameters()), distributed.get_rank(), 2)
    return whole_weights(model)


def under_fsdp2() -> Weights:
    model = built(use_reentrant=False)
    gcx.torch.centralize_in_backward(model)
    for part in (model.block, model):
        fully_shard(part)
    train(model, sgd(model.parameters()), distributed.get_rank(), 2)
    return whole_weights(model)


@pytest.mark.parametrize(
    "task",
    [*OF_ONE_PROCESS.values(), (under_ddp,), (under_fsdp2,)],
    ids=[*OF_ONE_PROCESS, "ddp", "fsdp2"],
)
def test_as_on_one_process(task: Any, expected: Weights) -> None:
    for weights in processes.run(2, *task):
        assert_weights(weights, expected)
