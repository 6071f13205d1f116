"""The setting of a measurement: versions, devices, memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from benchmarks.throughput.timing import machine
from gcx import __version__

__all__ = [
    "Setting",
    "free_bytes_of_host",
    "setting",
    "setting_lines",
    "share_gpus",
]

# Whatever can change the figures. CuPy has a distribution for each release of CUDA.
_PACKAGES = (
    "numpy",
    "ml_dtypes",
    "torch",
    "triton",  # for torch.compile
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "pytorch_optimizer",
    "jax",
    "optax",
    "cupy-cuda12x",
    "cupy-cuda13x",
)


@dataclass(frozen=True)
class Setting:
    """What a figure is to be read with."""

    command: str
    date: str
    gcx: str
    python: str
    processor: str
    devices: dict[str, str]  # names of those that are no CPU
    packages: dict[str, str]  # their versions


def setting(command: str, devices: Mapping[str, str]) -> Setting:
    """Describe this process; `devices` are the names of its GPUs, and of other accelerators."""
    installed = {d.name.lower().replace("-", "_"): d.version for d in metadata.distributions()}
    packages = {name: installed.get(name.replace("-", "_")) for name in _PACKAGES}
    return Setting(
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        gcx=__version__,
        python=platform.python_version(),
        processor=machine(),
        devices=dict(devices),
        packages={name: version for name, version in packages.items() if version},
    )


def setting_lines(found: Setting) -> list[str]:
    """Write it in a few lines."""
    devices = [f"{device}: {name}" for device, name in found.devices.items()]
    packages = [f"{name} {version}" for name, version in found.packages.items()]
    return [
        f"{found.command}, {found.date}",
        f"{found.processor}; {'; '.join(devices) or 'no GPU'}",
        f"gcx {found.gcx}, Python {found.python}, {', '.join(packages)}",
    ]


_MEMINFO = Path("/proc/meminfo")
_SMALL_MACHINE = 8 << 30  # what is taken for granted where nobody says how much there is


def share_gpus() -> None:
    """Keep JAX from taking most of the memory of all GPUs; call it before JAX is imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def free_bytes_of_host() -> int:
    """Memory that new arrays can take without anything being swapped out."""
    try:
        lines = _MEMINFO.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return _SMALL_MACHINE
    (available,) = (line for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(available.split()[1])
