"""The real launcher and its drivers: each launch that reaches the driver, byte for byte."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import recorded_launches
from emulated_cuda import KEPT

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc"),
    pytest.mark.skipif(sys.platform != "linux", reason="the driver's library has another name"),
]

HERE = Path(__file__).parent
CHECKS = [check.__name__ for check in recorded_launches.CHECKS]
ASKED = [*zip(CHECKS), *zip(CHECKS, recorded_launches.FAULTS, strict=True)]
FAILURE = r"in {}\n(?s:.*)^(AssertionError|Failed: DID NOT RAISE)"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = ("gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic")
    subprocess.run([*command, "-o", library, HERE / "cuda_driver.c", "-ldl"], check=True)
    return library


@pytest.mark.parametrize("package", ["cuda.bindings", "cupy"])
@pytest.mark.parametrize("asked", ASKED, ids="-".join)
def test_launches(driver: Path, asked: tuple[str, ...], package: str) -> None:
    """A check passes, and fails if a fault is planted."""
    pytest.importorskip(package)
    paths = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))
    program = HERE / "recorded_launches.py"
    done = subprocess.run(
        [sys.executable, program, driver, package, *asked],
        env={**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(KEPT)},
        capture_output=True,
        text=True,
        check=False,
    )
    fails = re.search(FAILURE.format(asked[0]), done.stderr, re.MULTILINE) is not None
    assert (done.returncode != 0) == fails == (len(asked) > 1), done.stderr
