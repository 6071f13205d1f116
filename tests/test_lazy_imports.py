"""gcx loads nothing that the caller has not loaded; seen from fresh processes."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from gcx.backends import LIBRARIES

FRAMEWORKS = {
    *("numpy", "torch", "jax", "jaxlib", "cupy", "optax", "keras", "dask"),
    *("array_api_strict", "ml_dtypes", "scipy", "matplotlib"),
}

# How to make an array of each library under test.
MAKE = {
    "numpy": "import numpy; grad = numpy.ones((2, 3))",
    "readonly": "import numpy; grad = numpy.ones((2, 3)); grad.flags.writeable = False",
    "strict": "import array_api_strict; grad = array_api_strict.ones((2, 3))",
    "dask": "import dask.array; grad = dask.array.ones((2, 3))",
    "torch": "import torch; grad = torch.ones(2, 3)",
    "jax": "import jax; grad = jax.numpy.ones((2, 3))",
    "cupy": "import cupy; grad = cupy.ones((2, 3))",
}


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
    before, after = loaded_after(
        MAKE[backend_name],
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
