"""From an array to its backend by its type; gcx loads nothing that the caller has not loaded."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import gcx
from gcx import _dispatch
from gcx._dispatch import backend_for
from gcx.backends import LIBRARIES


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No type has been seen before."""
    monkeypatch.setattr(_dispatch, "by_type", {})


def name_of(backend: Any) -> str:
    assert isinstance(backend, ModuleType)
    return backend.__name__.removeprefix("gcx.backends._")


def test_numpy_scalars_are_arrays_of_rank_0_and_text_is_none() -> None:
    assert gcx.centralize(np.float64(2.0)) == 2.0
    for value, message in ((np.int64(2), "not int64; convert"), ("text", "expected an array")):
        for _ in range(2):
            with pytest.raises(TypeError, match=message):
                gcx.centralize(value)


def test_subclass_of_a_torch_tensor() -> None:
    torch = pytest.importorskip("torch")

    class Mine(torch.Tensor):
        pass

    grad = torch.tensor([[1.0, 3.0]]).as_subclass(Mine)
    assert name_of(backend_for(grad)) == "torch"
    result = gcx.centralize(grad)
    assert type(result) is Mine
    assert result.tolist() == [[-1.0, 1.0]]
    assert name_of(backend_for(torch.nn.Parameter(grad))) == "torch"


def test_a_gradient_of_dtype_float0_does_not_turn_numpy_into_jax() -> None:
    jax = pytest.importorskip("jax")
    nothing = np.zeros((2, 3), jax.dtypes.float0)  # what JAX gives for an integer input
    with pytest.raises(TypeError, match="float0"):
        gcx.centralize(nothing)
    assert name_of(backend_for(np.ones((2, 3)))) == "numpy"


# Seen from fresh processes.
FRAMEWORKS = {
    *("numpy", "torch", "jax", "jaxlib", "cupy", "optax", "keras", "dask"),
    *("array_api_strict", "ml_dtypes", "scipy", "matplotlib"),
}

# The modules of the libraries under test, unless they have the name.
MODULES = {"readonly": "numpy", "strict": "array_api_strict", "dask": "dask.array"}
MODULES["jax"] = "jax.numpy"

# A statement that loads nothing, since it is refused.
REFUSED = """
try: gcx.centralize({})
except TypeError: pass
else: raise SystemExit
"""


def printed(*lines: str) -> list[str]:
    script = "\n".join(lines)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def loaded_after(*statements: str) -> list[set[str]]:
    """Modules of interest that a fresh process has loaded after each statement."""
    shows = "print(*(name for name in sys.modules if name.split('.')[0] in watched))"
    watch = f"import sys; watched = {(*FRAMEWORKS, 'array_api_compat', 'gcx')}"
    lines = printed(watch, *(line for statement in statements for line in (statement, shows)))
    return [set(line.split()) for line in lines]


def frameworks(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules} & FRAMEWORKS


def test_neither_framework_nor_backend_is_loaded() -> None:
    first, *others = loaded_after(
        "import gcx",
        "gcx.Layout('io...').fan_in_axes(4)",
        "import gcx.plan, gcx.testing, gcx.optim, gcx.diagnostics",
        "dir(gcx); gcx.__doc__; gcx.__version__",
        *[REFUSED.format(value) for value in ("[1.0]", "None", "'text'", "1.0")],
        "import numpy",
    )
    assert "gcx" in first
    assert {name for name in first if "compat" in name or name.startswith("gcx.backends.")} == set()
    *without, with_numpy = map(frameworks, (first, *others))
    assert without == [set()] * 8
    assert with_numpy == {"numpy"}, "or this test could not fail"


def test_an_adapter_without_its_framework_says_what_to_install() -> None:
    extras = {"optax": '"gcx[jax]"'} | {
        name: f'"gcx[{name}]"' for name in ("torch", "keras", "thinc")
    }
    lacking = {(name, name): extra for name, extra in extras.items()}
    lacking |= {(name, "torch"): extras["torch"] for name in ("lightning", "transformers")}
    if find_spec("torch") is not None:
        lacking |= {(name, name): name for name in ("lightning", "transformers")}
    script = f"""
from importlib import import_module
from importlib.machinery import PathFinder as finder
find = finder.find_spec
for name, package in {list(lacking)}:
    hidden = package, "pytorch_lightning"
    finder.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
    try: import_module("gcx." + name)
    except ModuleNotFoundError as error: print(error.name, error, sep=": ")"""
    assert printed(script) == [
        f"{package}: No module named '{package}'; pip install {requirement}"
        for (_, package), requirement in lacking.items()
    ]


def test_an_array_loads_its_own_backend_alone(backend_name: str) -> None:
    module = MODULES.get(backend_name, backend_name)
    before, after = loaded_after(
        f"import {module}; grad = {module}.ones((2, 3))",
        "import gcx; gcx.centralize(grad); gcx.centralize_many([grad, grad[0, ...]])",
    )
    assert frameworks(after) == frameworks(before)
    backend = {"readonly": "numpy", "strict": "array_api", "dask": "array_api"}
    expected = {backend.get(backend_name, backend_name)}
    if backend_name == "cupy":  # which shares what NumPy knows of dtypes
        expected.add("numpy")
    loaded = {name.partition("gcx.backends._")[2] for name in after}
    assert loaded & {*LIBRARIES, "array_api"} == expected
    assert "torch_cuda" not in loaded  # there is no tensor on CUDA
