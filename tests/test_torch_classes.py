"""gcx.torch.derive_class: a class that trainers take for the optimizer's own."""

from __future__ import annotations

import copy
import inspect
import pickle
from abc import ABC
from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer, RAdam

import gcx.torch

from torch_training import assert_means_kept, assert_same, attached, new_layer, train


class Abstract(ABC, RAdam):
    """Packages have a base class like this."""


@pytest.mark.parametrize("kind", [RAdam, Abstract])
def test_is_the_class_and_centralize(kind: Any) -> None:
    model, other = new_layer(), new_layer()
    derived = gcx.torch.derive_class(kind, model, where="update")
    assert issubclass(derived, kind)
    assert derived.__name__ == kind.__name__
    assert inspect.signature(derived) == inspect.signature(kind)
    optimizer = derived([{"params": [model.weight]}, {"params": [model.bias]}], 0.01)
    assert gcx.torch.centralized(optimizer).plan["weight"].layout is not None
    assert str(optimizer).startswith(f"{kind.__name__} (")
    assert_means_kept(model, lambda: train(model, optimizer))
    train(other, attached(other, where="update", kind=kind))
    assert_same(model, other)


def test_options_are_those_of_centralize() -> None:
    model = nn.Linear(1000, 3)
    other = copy.deepcopy(model)
    options: Any = {"where": "update", "strength": 0.5, "reproducible": True}
    options["overrides"] = {"weight": "io"}
    optimizer = SGD(other.parameters())
    gcx.torch.centralize(optimizer, other, **options)
    derived = gcx.torch.derive_class(SGD, model, **options)(model.parameters())
    for layer, steps in ((model, derived), (other, optimizer)):
        layer(torch.linspace(0, 1, 1000)).square().sum().backward()
        steps.step()
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(ValueError, match="there is nothing to centralize"):
        gcx.torch.derive_class(SGD, model, layers="conv")(model.parameters())


def test_a_subclass_prints_its_own_name() -> None:
    own = type("Own", (gcx.torch.derive_class(RAdam, new_layer(), where="update"),), {})
    assert repr(own).endswith(".Own'>")


def test_a_pickled_class_takes_its_model_along() -> None:
    model = new_layer()
    pair = gcx.torch.derive_class(Abstract, model, where="update"), model
    derived, copied = pickle.loads(pickle.dumps(pair))
    assert copied is not model
    assert_means_kept(copied, lambda: train(copied, derived(copied.parameters(), lr=0.01)))


def test_cloudpickle_leaves_the_class_its_model() -> None:
    model = new_layer()
    derived = gcx.torch.derive_class(SGD, model)
    held = cloudpickle.dumps(derived)
    assert cloudpickle.loads(held) is derived  # in its own process
    assert_means_kept(model, lambda: train(model, derived(model.parameters(), lr=0.01)))


@pytest.mark.parametrize("held", ["model", "class"])
def test_a_model_and_the_class_that_it_holds_can_be_pickled(held: str) -> None:
    """Models of some trainers hold the class of their optimizer."""
    model: Any = new_layer()
    model.kind = gcx.torch.derive_class(SGD, model)
    if held == "model":
        model = pickle.loads(pickle.dumps(model))
        assert_means_kept(model, lambda: train(model, model.kind(model.parameters())))
    else:
        kind = pickle.loads(pickle.dumps(model.kind))
        with pytest.raises(RuntimeError, match="not in the model"):  # but in a copy of it
            kind(model.parameters())


def test_wrappers_make_the_optimizer_inside_of_it() -> None:
    class Around(Optimizer):
        def __init__(self, params: Any, base: Any, **options: Any) -> None:
            super().__init__(params, options)
            self.base_optimizer = base(self.param_groups, **options)

        def step(self, closure: Any = None) -> None:
            self.base_optimizer.step(closure)

    model = new_layer()
    inner = gcx.torch.derive_class(SGD, model)
    optimizer = Around(model.parameters(), inner, lr=0.01, momentum=0.9, weight_decay=0.1)
    assert_means_kept(model, lambda: train(model, optimizer))


@pytest.mark.parametrize("kind", ["RAdam", nn.Linear, SGD(new_layer().parameters())])
def test_kind_is_an_optimizer_class(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"kind is a torch optimizer class, .* not "):
        gcx.torch.derive_class(kind, new_layer())


def test_parameters_belong_to_the_model() -> None:
    derived = gcx.torch.derive_class(SGD, new_layer())
    with pytest.raises(RuntimeError, match="not in the model"):
        derived(new_layer(1).parameters())
    with pytest.raises(ValueError, match="where"):
        gcx.torch.derive_class(SGD, new_layer(), where="updates")  # type: ignore[arg-type]
