"""Every library on every device, the array API reference, and the dtypes that they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import gcx
from benchmarks.agreement.formats import Format
from benchmarks.agreement.gradients import Case
from benchmarks.command.libraries import LeftOut
from gcx.__main__ import LibraryInfo, attempt
from gcx.backends import _array_api, load

__all__ = [
    "ARRAY_API",
    "Subject",
    "Target",
    "missing_dtypes",
    "refusals",
    "targets_of",
]


@dataclass(frozen=True)
class Target:
    """One way from a NumPy gradient to a centralized one."""

    backend: str
    device: str
    needs_fan_in: bool  # cannot be asked about gradients that stay as they are
    asarray: Callable[[Any, str], Any]
    centralize: Callable[[Any, Case], Any]
    to_numpy: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}"

    def make(self, values: Any, kind: Format) -> Any:
        """Make an array of that very dtype, which holds `values` unchanged, or raise."""
        array = self.asarray(values, kind.name)
        if not str(array.dtype).endswith(kind.name):
            raise TypeError(f"made {array.dtype} when asked for {kind.name}")
        if not np.array_equal(self.to_numpy(array), values, equal_nan=True):
            raise ValueError(f"does not hold every number of {kind.name}")
        return array


def targets_of(library: LibraryInfo) -> list[Target]:
    """One target for each device of a library."""
    backend = load(library.name)

    def on(device: str) -> Target:
        return Target(
            library.name,
            device,
            needs_fan_in=False,
            asarray=lambda values, dtype: backend.asarray(values, dtype, device),
            centralize=lambda grad, case: gcx.centralize(grad, layout=case.layout),
            to_numpy=backend.to_numpy,
        )

    return [on(device) for device in library.devices]


def _numpy_alone(values: Any, dtype: str) -> Any:
    made = values.astype(np.dtype(dtype))
    if made.dtype.kind == "V":  # of the ml_dtypes package
        raise TypeError(f"{dtype} is not a dtype of NumPy itself")
    return made


# The way for libraries that have no backend of their own, on arrays of NumPy. It is called
# directly, since `gcx.centralize` would choose NumPy's own; no backend is called without a fan-in.
ARRAY_API = Target(
    "array API",
    "cpu",
    needs_fan_in=True,
    asarray=_numpy_alone,
    centralize=lambda grad, case: _array_api.centralize(grad, case.fan_in, 1.0, None, False),
    to_numpy=lambda array: array,
)


Subject = tuple[Target, Format]

# Dtypes that some library or device has not got; the others are never left out in peace.
_OPTIONAL = ("float64", "bfloat16", "float8_e4m3fn", "complex64")


def missing_dtypes(subjects: Iterable[Subject]) -> dict[Subject, LeftOut]:
    """Dtypes that a target cannot make arrays of, with its own words for it."""

    def make(target: Target, kind: Format) -> object:
        return target.make(np.ones(1, "complex128" if kind.is_complex else "float64"), kind)

    return refusals(subjects, make, lambda _, kind: kind.name in _OPTIONAL)


def refusals(
    subjects: Iterable[Subject],
    ask: Callable[[Target, Format], object],
    may_refuse: Callable[[Target, Format], bool],
) -> dict[Subject, LeftOut]:
    """Put a question to each target in each dtype, and keep what is raised."""
    refused = {}
    for target, kind in subjects:
        _, why = attempt(partial(ask, target, kind))
        if why:
            is_fine = may_refuse(target, kind)
            refused[target, kind] = LeftOut(is_fine, f"{kind.name} in {target}", why)
    return refused
