"""The check of a plan by one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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


def _mixture(x: Tensor, weights: Tensor) -> Tensor:
    return x @ torch.einsum("e,eio->io", x.mean(0)[:2].softmax(0), weights.view(2, 4, 6))


def _within(transform: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Uses(lambda x, w: transform(partial(F.linear, weight=w))(x), 3, 4)


X = torch.rand(5, 4)
MIXTURE = Layout("(bi)o", b=2)
# The model, its input, the layout of the only weight (None: of the layer), and the verdict.
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Any, str]] = {
    "linear": (lambda: nn.Linear(4, 3), X, None, "agree"),
    "frozen, by its parent": (lambda: Uses(F.linear, 3, 4), X, None, "agree"),
    "transposed": (lambda: Uses(lambda x, w: x @ w, 4, 3), X, None, "4 entries from 4"),
    "transposed, and told": (lambda: Uses(lambda x, w: x @ w, 4, 3), X, "io", "agree"),
    "tied": (lambda: Uses(_tied, 3, 4), X, None, "3 entries from 3 output units of 4"),
    "mixture of a stack": (lambda: Uses(_mixture, 8, 6), X, MIXTURE, "unseen"),
    "mixture, as rows": (lambda: Uses(_mixture, 8, 6), X, None, "2 entries from 2"),
    "chosen of a stack": (
        lambda: Uses(lambda x, w: x @ w.view(2, 4, 6)[x.argmax() % 2], 8, 6),
        *(X, MIXTURE, "agree"),
    ),
    "element by element": (lambda: Uses(lambda x, w: x[:3] * w, 3, 4), X, None, "1 entries from 1"),
    "shaped like data": (lambda: Uses(lambda x, w: x @ w.to(x).T, 3, 4), X, None, "agree"),
    "in place": (lambda: Uses(lambda x, w: x[:3].add_(w) @ w.T, 3, 4), X, None, "agree"),
    "not used": (lambda: Uses(lambda x, w: x, 3, 4), X, None, "unseen"),
    "without gradients": (
        lambda: Uses(lambda x, w: F.linear(x, w.detach()), 3, 4),
        *(X, None, "unseen"),
    ),
    "constants times a weight": (
        lambda: Uses(lambda x, w: (torch.eye(4) @ w.T) * x.T[:, :3], 3, 4),
        *(X, None, "agree"),
    ),
    "convolution, at its edges": (
        lambda: nn.Conv2d(2, 3, 5, padding=2),
        *(torch.rand(1, 2, 3, 3), None, "agree"),
    ),
    "convolution in groups, transposed": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
        *(torch.rand(1, 4, 5), None, "agree"),
    ),
    "grouped, read as one": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
        *(torch.rand(1, 4, 5), "o...", "from 2 output units of 9"),
    ),
    "convolution, padding hides a part": (
        lambda: nn.Conv2d(4, 4, 5, padding=2),
        *(torch.rand(1, 4, 1, 1), None, "unseen"),
    ),
    "convolution, a mask hides a part": (
        lambda: Uses(lambda x, w: F.conv1d(x, w * (w < 9).triu(), padding=1), 3, 2, 3),
        *(torch.rand(1, 2, 5), "oii", "from 1 output units of 6"),
    ),
    "convolution, too fine": (
        lambda: nn.Conv2d(2, 4, 3),
        *(torch.rand(1, 2, 5, 5), "ooii", "18 entries from 2 output units of 9"),
    ),
    "linear, too fine": (
        lambda: nn.Linear(4, 3),
        *(X, Layout("o(oi)", o=2), "4 entries from 2 output units of 2"),
    ),
    "a stack, mixed in one operation": (
        lambda: Uses(lambda x, w: torch.einsum("eb,eoi,bi->bo", x.T[:2], w, x), 2, 3, 4),
        *(X, "boi", "unseen"),
    ),
    "two layers in one operation": (
        lambda: nn.Sequential(
            Uses(lambda x, w: torch.einsum("bi,ri,or->bo", x, w, w[:, :3]), 3, 4)
        ),
        *(X, None, "unseen"),
    ),
    "vmap": (_within(torch.func.vmap), X, None, "unseen"),
    "jacrev": (_within(torch.func.jacrev), X, None, "unseen"),
    "parts, added": (
        lambda: Uses(lambda x, w: x[:, :1] @ w[:, :1].T + x[:, 1:] @ w[:, 1:].T, 3, 4),
        *(X, None, "from 1 output units of 4"),
    ),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), X, None, "unseen"),
    "LSTM": (lambda: nn.LSTM(4, 3, bias=False), X[None], None, "unseen"),
    "masked, and told": (lambda: Masked(4), X, "oi", "from 1 output units of 4"),
}


@pytest.mark.parametrize("case", CASES)
def test_check(case: str) -> None:
    torch.manual_seed(0)
    make, x, layout, verdict = CASES[case]
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
