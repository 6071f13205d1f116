"""Plan models in use on the meta device, and print the share of parameters that plans know."""

from __future__ import annotations

import json
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from io import StringIO
from math import prod
from typing import Any

import torch
from torch import nn

import gcx.torch
from benchmarks.coverage.more_packages import MORE_PACKAGES
from benchmarks.coverage.packages import PACKAGES, Make
from benchmarks.coverage.stand_ins import import_package
from gcx.__main__ import attempt
from gcx.plan import aligned

__all__ = ["SOURCES", "Coverage", "main"]

_ADAPTED = {"target_modules": ["q_proj", "up_proj", "down_proj"], "r": 4}
# Options by which each tuner fits the small Llama below.
_TUNERS: Mapping[str, Mapping[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 4},
    "ADAMSS": {"init_weights": None},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "OFT": {"r": 0, "oft_block_size": 4},
    "ROAD": {"group_size": 16},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 10},
}
_PROMPTS = {"num_virtual_tokens": 3, "encoder_hidden_size": 16, "num_tasks": 2}

# Planned without memory for their weights, which is more than some other packages can do.
_LARGE = ("timm", "transformers", "diffusers", "segmentation_models_pytorch", "pytorchcv")

Models = Iterator[tuple[str, Callable[[], nn.Module]]]


@dataclass
class Coverage:
    """Tensors and elements, counted by the decision of the plans."""

    models: int = 0
    failed: list[str] = field(default_factory=list)
    tensors: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)  # elements by reason

    def add(self, model: nn.Module, *, trained_alone: bool) -> None:
        """Count the parameters of a model, or only the trained ones."""
        parameters = dict(model.named_parameters())
        self.models += 1
        for row in gcx.torch.plan(model):
            if trained_alone and not parameters[row.name].requires_grad:
                continue
            kind = "unknown" if row.reason.startswith("unknown") else "left alone"
            kind = "centralized" if row.layout is not None else kind
            self.tensors[kind] += 1
            self.elements[kind] += prod(row.shape)
            if kind == "unknown":
                self.unknown[row.reason] += prod(row.shape)

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(
            self.models + other.models,
            self.failed + other.failed,
            self.tensors + other.tensors,
            self.elements + other.elements,
            self.unknown + other.unknown,
        )

    def shares(self) -> dict[str, float]:
        """Return the unknown parts of all tensors and of all elements."""
        counts = {"tensors": self.tensors, "elements": self.elements}
        return {name: n["unknown"] / max(n.total(), 1) for name, n in counts.items()}


def _timm() -> Models:
    timm = import_package("timm")
    for name in timm.list_models():
        yield name, partial(timm.create_model, name)


def _transformers() -> Models:
    auto = import_package("transformers.models.auto")
    transformers = import_package("transformers")
    for name in auto.configuration_auto.CONFIG_MAPPING_NAMES:

        def make(name: str = name) -> nn.Module:
            config = transformers.AutoConfig.for_model(name)
            model: nn.Module = transformers.AutoModel.from_config(config)
            return model

        yield name, make


def _peft() -> Models:
    peft, transformers = import_package("peft"), import_package("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=99,
    )
    for kind, tuner in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():

        def make(kind: Any = kind, tuner: Any = tuner) -> nn.Module:
            known = tuner.__dataclass_fields__
            options = {**_ADAPTED, **_PROMPTS, **_TUNERS.get(kind.value, {})}
            given = {name: value for name, value in options.items() if name in known}
            with torch.device("cpu"):  # some tuners look at the weights
                base = transformers.LlamaForCausalLM(config)
                model: nn.Module = peft.get_peft_model(base, tuner(task_type="CAUSAL_LM", **given))
            return model

        yield kind.value, make


def _model_of(make: Make) -> nn.Module:
    return make().model


def _package(name: str) -> Callable[[], Models]:
    def models() -> Models:
        for model, make in PACKAGES[name].items():
            yield model, partial(_model_of, make)

    return models


def _further(name: str) -> Callable[[], Models]:
    def models() -> Models:
        for make in MORE_PACKAGES[name]:
            yield getattr(make, "path", ""), partial(make, name)

    return models


SOURCES: Mapping[str, Callable[[], Models]] = {
    "timm": _timm,
    "transformers": _transformers,
    "peft": _peft,
    **{name: _package(name) for name in PACKAGES},
    **{name: _further(name) for name in MORE_PACKAGES},
}


def main(arguments: Sequence[str]) -> int:
    """Print the coverage of the packages that are installed."""
    parser = ArgumentParser(prog="python -m benchmarks coverage", description=__doc__)
    parser.add_argument("sources", nargs="*", help=f"some of: {', '.join(SOURCES)}", metavar="NAME")
    parser.add_argument("--limit", type=int, help="the first models of each package alone")
    parser.add_argument("--unknown", action="store_true", help="list the unknown parameters")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and no text")
    options = parser.parse_args(arguments)
    for name in options.sources:
        if name not in SOURCES:
            parser.error(f"no such package: {name}")
    found = {
        name: _cover(name, options.limit)
        for name in options.sources or SOURCES
        if not attempt(partial(import_package, name))[1]
    }
    if options.json:
        print(json.dumps({name: _figures(each) for name, each in found.items()}, indent=2))
        return 0
    others = [each for name, each in found.items() if name not in _BY_THEMSELVES]
    together = {f"{len(others)} packages": sum(others, Coverage())} if len(others) > 1 else {}
    rows = map(_row, [*found.items(), *together.items()])
    numbers = range(2, len(_HEADER))
    print("\n".join(aligned([_HEADER, *rows], to_the_right=numbers)))
    missing = [name for name in options.sources or SOURCES if name not in found]
    if missing:
        print(f"not installed here: {', '.join(missing)}")
    for name, each in found.items() if options.unknown else ():
        for reason, elements in each.unknown.most_common():
            print(f"{name}: {elements:,} elements {reason}")
    return 0


def _cover(name: str, limit: int | None) -> Coverage:
    coverage = Coverage()
    for k, (model, make) in enumerate(SOURCES[name]()):
        if limit is not None and k >= limit:
            break
        with warnings.catch_warnings(), torch.device(_device(name)):
            warnings.simplefilter("ignore")
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                built, error = attempt(make)
        if built is None:
            coverage.failed.append(f"{model}: {error}")
        else:
            coverage.add(built, trained_alone=name == "peft")
    return coverage


def _device(name: str) -> str:
    return "meta" if name in _LARGE else "cpu"


_BY_THEMSELVES = ("timm", "transformers", "peft")
_HEADER = (
    "package",
    "version",
    "models",
    "not built",
    "centralized",
    "left alone",
    "unknown",
    "of tensors",
    "of elements",
)


def _row(named: tuple[str, Coverage]) -> tuple[str, ...]:
    name, each = named
    kinds = [each.tensors[kind] for kind in ("centralized", "left alone", "unknown")]
    shares = [f"{share:.3%}" for share in each.shares().values()]
    return (
        name,
        _version(name),
        *(f"{n:,}" for n in (each.models, len(each.failed), *kinds)),
        *shares,
    )


def _version(package: str) -> str:
    distributions = metadata.packages_distributions().get(package, ())
    return metadata.version(distributions[0]) if distributions else ""


def _figures(each: Coverage) -> dict[str, Any]:
    counts = {"tensors": dict(each.tensors), "elements": dict(each.elements)}
    return {"models": each.models, "not built": each.failed, **counts, "unknown": each.shares()}
