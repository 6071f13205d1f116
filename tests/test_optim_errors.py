"""Errors of gcx.optim: hyperparameters, parameters, layouts, gradients and state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gcx.optim import SGD, Adam, AdamW

from test_optim import LAYOUTS, arrays, problem

WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (SGD, {"lr": -0.1}, r"lr must be a number in \[0, inf\), not -0.1"),
    (SGD, {"lr": math.nan}, "lr must be .* not nan"),
    (SGD, {"lr": math.inf}, "lr must be .* not inf"),
    (SGD, {"lr": "0.1"}, "lr must be .* not '0.1'"),
    (
        SGD,
        {"lr": lambda step: 0.1 / step},
        "lr must be .* not <function.*schedule use dataclasses",
    ),
    (Adam, {"lr": np.array(0.1)}, "lr must be .* not array.*schedule use dataclasses"),
    (SGD, {"momentum": 1.0}, r"momentum must be a number in \[0, 1.0\), not 1.0"),
    (SGD, {"nesterov": True}, "nesterov=True needs .* not momentum=0.0"),
    (SGD, {"weight_decay": -1e-4}, "weight_decay must be .* not -0.0001"),
    (SGD, {"where": "weights"}, "where is one of .* not 'weights'"),
    (SGD, {"layouts": "x"}, "layout 'x' is not valid"),
    (Adam, {"betas": (0.9, 1.0)}, r"betas\[1\] must be .* not 1.0"),
    (Adam, {"betas": (-0.1, 0.9)}, r"betas\[0\] must be .* not -0.1"),
    (Adam, {"betas": (0.9,)}, r"betas must be two numbers, not \(0.9,\)"),
    (Adam, {"betas": 0.9}, "betas must be two numbers, not 0.9"),
    (AdamW, {"eps": -1e-8}, "eps must be .* not -1e-08"),
]


@pytest.mark.parametrize(("kind", "options", "message"), WRONG)
def test_a_wrong_hyperparameter_is_named(kind: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"lr": 0.1, **options})


NET = problem(0)[0]
NO_FIT: list[tuple[Any, Any, type[Exception], str]] = [
    ("oi", NET, ValueError, "conv: layout 'oi' is for arrays of rank 2, not 4"),
    ({"*": None}, NET, ValueError, r"centralizes no parameter.*conv \(4, 3, 2, 2\).*where=None"),
    ({"*weight": "o..."}, NET, ValueError, r"'\*weight' matches no parameter"),
    ({"conv": "o..."}, NET, ValueError, "no key matches 'dense/kernel'"),
    (["o..."], NET, ValueError, "layouts is not built like"),
    (7, NET, TypeError, "not int"),
    ("o...", np.ones(2), TypeError, "params is a list, tuple or dict of arrays, not numpy.ndarray"),
    *[("o...", empty, ValueError, "params holds no array") for empty in ({}, {"a": []})],
    ("o...", {"w": None}, TypeError, "w: expected an array"),
    ("o...", {"w": np.ones((2, 2), int)}, TypeError, "w: .* floating dtype, not int64"),
    ("o...", {"b": np.ones(2), "w": np.ones((2, 1))}, ValueError, r"centralizes no .*w \(2, 1\)"),
]


@pytest.mark.parametrize(("layouts", "params", "error", "message"), NO_FIT)
def test_init_refuses_what_does_not_fit(
    layouts: Any, params: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        SGD(0.1, layouts=layouts).init(params)


def test_update_refuses_what_does_not_fit(xp: Any) -> None:
    start, grads = [arrays(xp, tree) for tree in problem(1)]
    optimizer = SGD(0.1, momentum=0.9, layouts=LAYOUTS)
    state = optimizer.init(start)

    def refuses(message: str, **wrong: Any) -> None:
        given = {"params": start, "grads": grads, "state": state} | wrong
        with pytest.raises(ValueError, match=message):
            optimizer.update(**given)

    refuses("params holds no array", params={})
    refuses("grads is not built like", grads={"conv": grads["conv"]})
    refuses(
        r"scale: the gradient has shape \(3,\), its parameter \(\)",
        grads={**grads, "scale": grads["dense"]["bias"]},
    )
    refuses(
        "conv: the gradient has dtype .*float32, its parameter .*float64",
        grads={**grads, "conv": xp.asarray(np.ones((4, 3, 2, 2)), "float32")},
    )
    refuses(r"state comes from init\(params\) .* not NoneType", state=None)
    refuses(r"and has \['step', 'momentum'\], not \['step'\]", state={"step": {}})
    refuses(r"state\['momentum'\] is not built like", state={**state, "momentum": {}})
    bias = grads["dense"]["bias"]
    for each in (optimizer, Adam(layouts=LAYOUTS)):
        optimizer, state = each, each.init(start)
        for buffer in state.keys() - {"step"}:
            message = rf"scale: the {buffer} has shape \(3,\), its parameter \(\)"
            refuses(message, state={**state, buffer: {**state[buffer], "scale": bias}})


def test_update_refuses_gradients_of_another_library(xp: Any) -> None:
    stranger: Any = np.ones((2, 2))
    if xp.backend == "numpy":
        import array_api_strict

        stranger = array_api_strict.asarray(stranger)
    params = {"w": xp.asarray(np.ones((2, 2)))}
    optimizer = SGD(0.1)
    with pytest.raises(TypeError, match=r"w: the gradient is a .*, its parameter a "):
        optimizer.update(params, {"w": stranger}, optimizer.init(params))
