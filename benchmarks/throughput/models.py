"""What is measured: the shapes of the weights of well-known models, and of their other parameters.

Only shapes count for speed, so no model is built and no package needed. Every parameter of two or
more dimensions that holds numbers per output unit is a weight here, embeddings too: the work is
that of all large gradients of a model, though `gcx.torch` leaves embeddings alone by default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from gcx.layout import Layout

__all__ = ["DTYPES", "MODELS", "Model", "Weight", "llama3", "output_first"]

# Bytes of an element.
DTYPES = {"float32": 4, "bfloat16": 2}

_OUTPUT_FIRST, _OUTPUT_LAST = "o...", "...o"
Shape = tuple[int, ...]


class Weight(NamedTuple):
    """A weight to be centralized."""

    shape: Shape
    layout: str = _OUTPUT_FIRST

    @property
    def axes(self) -> tuple[int, ...]:
        """The fan-in."""
        return Layout(self.layout).fan_in_axes(len(self.shape))

    @property
    def fan_in(self) -> int:
        """Number of elements that are averaged."""
        return prod(self.shape[axis] for axis in self.axes)

    @property
    def units(self) -> int:
        """Number of means."""
        return prod(self.shape) // self.fan_in


@dataclass(frozen=True)
class Model:
    """Shapes of all parameters: the weights, and the others (biases, norms, tokens)."""

    title: str
    weights: tuple[Weight, ...]
    others: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        """Number of elements of all weights."""
        return sum(prod(weight.shape) for weight in self.weights)

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters."""
        return self.elements + sum(map(prod, self.others))


def output_first(model: Model) -> Model:
    """Transpose the weights (in, out) of a model, so that output units come first in all."""
    weights = tuple(
        weight if weight.layout == _OUTPUT_FIRST else Weight(weight.shape[::-1])
        for weight in model.weights
    )
    return replace(model, title=f"{model.title}, output first", weights=weights)


def _resnet50() -> Model:
    """He et al. (2016), with the stride in the 3x3 convolutions."""
    convolutions = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(blocks):
            convolutions += [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                convolutions.append((outputs, inputs, 1, 1))  # past the block
            inputs = outputs
    norms = [(shape[0],) for shape in convolutions for _ in ("weight", "bias")]
    weights = [*map(Weight, convolutions), Weight((1000, inputs))]
    return Model("ResNet-50", tuple(weights), (*norms, (1000,)))


def _vit_b16() -> Model:
    """Dosovitskiy et al. (2021)."""
    width, blocks, classes = 768, 12, 1000
    block = _transformer_block(width)
    weights = (Weight((width, 3, 16, 16)), *blocks * block, Weight((classes, width)))
    tokens = ((1, 1, width), (1, 197, width))  # of the class, of the positions
    biases = tuple(weight.shape[:1] for weight in weights)
    norms = (4 * blocks + 2) * ((width,),)
    return Model("ViT-B/16", weights, (*tokens, *biases, *norms))


def _gpt2(title: str, width: int, blocks: int) -> Model:
    """Radford et al. (2019), as in transformers, whose `Conv1D` has weights (in, out)."""
    block = tuple(Weight(weight.shape[::-1], _OUTPUT_LAST) for weight in _transformer_block(width))
    embeddings = (Weight((50257, width)), Weight((1024, width)))
    biases = blocks * tuple(weight.shape[1:] for weight in block)
    norms = (4 * blocks + 2) * ((width,),)
    return Model(title, (*embeddings, *blocks * block), (*biases, *norms))


def _transformer_block(width: int) -> tuple[Weight, ...]:
    attention = Weight((3 * width, width)), Weight((width, width))
    return (*attention, Weight((4 * width, width)), Weight((width, 4 * width)))


def llama3(title: str, blocks: int, *, has_embedding: bool) -> Model:
    """Llama 3 of 8 billion parameters (Grattafiori et al., 2024), or so many blocks of it."""
    width, keys, hidden, words = 4096, 1024, 14336, 128256
    attention = Weight((width, width)), Weight((keys, width)), Weight((keys, width))
    mlp = Weight((hidden, width)), Weight((hidden, width)), Weight((width, hidden))
    block = (*attention, Weight((width, width)), *mlp)
    ends = (1 + has_embedding) * (Weight((words, width)),)
    norms = (2 * blocks + 1) * ((width,),)
    return Model(title, (*blocks * block, *ends), norms)


MODELS = {
    "resnet50": _resnet50(),
    "vit-b16": _vit_b16(),
    "gpt2": _gpt2("GPT-2 small", width=768, blocks=12),
    "gpt2-xl": _gpt2("GPT-2 XL", width=1600, blocks=48),
    "llama3-8b-slice": llama3("Llama-3-8B, 8 blocks and head", blocks=8, has_embedding=False),
}
