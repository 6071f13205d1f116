"""The CUDA kernel, compiled ahead of time as CuPy compiles it: what the machine is told to do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("cupy_backends")

from cupy_backends.cuda.libs import nvrtc

from gcx.backends import _cupy_kernels
from gcx.backends._cupy_kernels import PER_THREAD, THREADS

PLACES = find_spec("triton")
if PLACES is None or PLACES.origin is None:
    pytest.skip("Triton, which brings the headers of CUDA, is not installed", allow_module_level=True)
NVIDIA = Path(PLACES.origin).parent / "backends" / "nvidia"

ARCHITECTURES = (80, 90, 100)
REGISTERS = 1 << 16  # of a multiprocessor

# What CuPy adds.
OF_CUPY = ("-ftz=true", "--device-as-default-execution-space")

# All kinds of tiles write packs once. Long rows and panels that are split are read twice.
PACKED_STORES = 7
PACKED_LOADS = 9
