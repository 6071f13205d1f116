"""The check of a plan by one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import gcx.torch
from gcx import Layout


class Uses(nn.Module):
    """A dense layer, or several in a stack, whose weight the parent reads by itself."""

    def __init__(self, use: Callable[[Tensor, Tensor], Any], *shape: int) -> None:
        super().__init__()
        self.inner = nn.Linear(shape[-1], shape[0])
        self.inner.weight = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(x, self.inner.weight)


class Masked(nn.Linear):
    mask: Tensor

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.register_buffer("mask", torch.tril(torch.ones(size, size)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def _tied(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.linear(x, weight), weight.t())


def _written(x: Tensor, weight: Tensor) -> Tensor:
    buffer = torch.zeros(3, 4)
    buffer[:] = x[:3]
    return buffer * weight


def _mixture(x: Tensor, weights: Tensor) -> Tensor:
    return x @ torch.einsum("e,eio->io", x.mean(0)[:2].softmax(0), weights.view(2, 4, 6))


def uses(use: Callable[[Tensor, Tensor], Any], *shape: int) -> Callable[[], nn.Module]:
    return lambda: Uses(use, *shape)


def _within(transform: Callable[..., Any]) -> Callable[[], nn.Module]:
    return uses(lambda x, w: transform(partial(F.linear, weight=w))(x), 3, 4)


class Case(NamedTuple):
    """A model with one weight, the verdict on it, its layout if the layer has another, an input."""

    make: Callable[[], nn.Module]
    verdict: str = "agree"
    layout: Any = None
    x: Tensor = torch.rand(5, 4)


MIXTURE = Layout("(bi)o", b=2)
IN_GROUPS, IMAGE = partial(nn.ConvTranspose1d, 4, 6, 3, groups=2), torch.rand(1, 2, 5, 5)
SEQUENCE, OF_FOUR = torch.rand(1, 4, 5), torch.rand(1, 4, 1, 1)
CASES = {
    "linear": Case(lambda: nn.Linear(4, 3)),
    "frozen, by its parent": Case(uses(F.linear, 3, 4)),
    "transposed": Case(uses(lambda x, w: x @ w, 4, 3), "4 entries from 4"),
    "transposed, and told": Case(uses(lambda x, w: x @ w, 4, 3), layout="io"),
    "tied": Case(uses(_tied, 3, 4), "3 entries from 3 output units of 4"),
    "mixture of a stack": Case(uses(_mixture, 8, 6), "unseen", MIXTURE),
    "mixture, as rows": Case(uses(_mixture, 8, 6), "2 entries from 2"),
    "chosen of a stack": Case(
        uses(lambda x, w: x @ w.view(2, 4, 6)[x.argmax() % 2], 8, 6), layout=MIXTURE
    ),
    "element by element": Case(uses(lambda x, w: x[:3] * w, 3, 4), "1 entries from 1"),
    "written into a buffer": Case(uses(_written, 3, 4), "1 entries from 1"),
    "beside data": Case(uses(lambda x, w: torch.cat([x[:1], w]), 3, 4), "unseen"),
    "shaped like data": Case(uses(lambda x, w: x @ w.to(x).T, 3, 4)),
    "in place": Case(uses(lambda x, w: x[:3].add_(w) @ w.T, 3, 4)),
    "not used": Case(uses(lambda x, w: x, 3, 4), "unseen"),
    "without gradients": Case(uses(lambda x, w: F.linear(x, w.detach()), 3, 4), "unseen"),
    "constants times a weight": Case(uses(lambda x, w: (torch.eye(4) @ w.T) * x.T[:, :3], 3, 4)),
    "convolution, at its edges": Case(
        lambda: nn.Conv2d(2, 3, 5, padding=2), x=torch.rand(1, 2, 3, 3)
    ),
    "convolution in groups, transposed": Case(IN_GROUPS, x=SEQUENCE),
    "grouped, read as one": Case(IN_GROUPS, "from 2 output units of 9", "o...", SEQUENCE),
    "convolution, padding hides a part": Case(
        lambda: nn.Conv2d(4, 4, 5, padding=2), "unseen", x=OF_FOUR
    ),
    "convolution, a mask hides a part": Case(
        uses(lambda x, w: F.conv1d(x, w * (w < 9).triu(), padding=1), 3, 2, 3),
        *("from 1 output units of 6", "oii", IMAGE[0, :, 0][None]),
    ),
    "convolution, too fine": Case(
        lambda: nn.Conv2d(2, 4, 3), "18 entries from 2 output units of 9", "ooii", IMAGE
    ),
    "linear, too fine": Case(
        lambda: nn.Linear(4, 3), "4 entries from 2 output units of 2", Layout("o(oi)", o=2)
    ),
    "a stack, mixed in one operation": Case(
        uses(lambda x, w: torch.einsum("eb,eoi,bi->bo", x.T[:2], w, x), 2, 3, 4), "unseen", "boi"
    ),
    "two layers in one operation": Case(
        uses(lambda x, w: torch.einsum("bi,ri,or->bo", x, w, w[:, :3]), 3, 4), "unseen"
    ),
    "vmap": Case(_within(torch.func.vmap), "unseen"),
    "jacrev": Case(_within(torch.func.jacrev), "unseen"),
    "parts, added": Case(
        uses(lambda x, w: x[:, :1] @ w[:, :1].T + x[:, 1:] @ w[:, 1:].T, 3, 4),
        "from 1 output units of 4",
    ),
    "weight norm": Case(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), "unseen"),
    "LSTM": Case(lambda: nn.LSTM(4, 3, bias=False), "unseen", x=torch.rand(1, 5, 4)),
    "masked, and told": Case(lambda: Masked(4), "from 1 output units of 4", "oi"),
}


@pytest.mark.parametrize("case", CASES)
def test_check(case: str) -> None:
    torch.manual_seed(0)
    make, verdict, layout, x = CASES[case]
    model = make()
    overrides = {"*weight*": layout} if layout else None
    requires_grad = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    found = gcx.torch.check_plan(model, x, overrides=overrides)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert gcx.torch.check_plan(model, x, overrides=overrides) == found
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert all(p.grad is None for p in model.parameters())
    if verdict in ("agree", "unseen"):
        assert getattr(found, verdict)
        assert not found.disagree
        assert bool(found.agree) == (verdict == "agree")
    else:
        (said,) = found.disagree.values()
        assert verdict in said


def test_masked_layers_are_left_alone() -> None:
    (weight, _) = gcx.torch.plan(Masked(4))
    assert weight.reason == "masked: the mean would take in the entries behind the mask"
    plain = Masked(4)
    plain.mask = torch.ones(5)  # of something else
    assert gcx.torch.plan(plain)[0].layout == Layout("o...")
    assert gcx.torch.plan(Masked(4), overrides={"weight": "oi"})[0].layout == Layout("oi")


def test_the_default_device_has_no_say() -> None:
    layer, x = nn.Linear(4, 3), torch.rand(2, 4)
    with torch.device("meta"):
        assert gcx.torch.check_plan(layer, x).agree == ("weight",)
