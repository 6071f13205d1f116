"""What gcx offers: the names, their documentation, and what ships with them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any

import pytest

import gcx

import libraries

API_PAGES = sorted((Path(__file__).parents[1] / "docs" / "api").glob("*.md"))

# Public modules, each with the library that it needs.
MODULES = {
    "gcx": "numpy",
    "gcx.diagnostics": "numpy",
    "gcx.optim": "numpy",
    "gcx.plan": "numpy",
    "gcx.testing": "numpy",
    "gcx.torch": "torch",
    "gcx.optax": "jax",
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Any:
    library = MODULES[request.param]
    if not libraries.installed(library):
        pytest.skip(f"needs {library}")
    return import_module(request.param)


def public(module: Any) -> dict[str, Any]:
    objects = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in objects.items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def api() -> str:
    return "".join(page.read_text(encoding="utf-8") for page in API_PAGES)


@pytest.mark.parametrize("name", ["gcx", "gcx.torch"])  # pages that list names one by one
def test_names_are_those_of_the_documentation(name: str, api: str) -> None:
    if not libraries.installed(MODULES[name]):
        pytest.skip(f"needs {MODULES[name]}")
    documented = re.findall(rf"auto(?:function|class):: {name}\.(\w+)$", api, re.MULTILINE)
    assert sorted(public(import_module(name))) == sorted(documented)
    assert set(public(gcx)) == {"Layout", "centralize", "centralize_many"}


def test_adapters_say_how_they_are_imported() -> None:
    absent = "import gcx\ntry:\n    gcx.torch\nexcept AttributeError as error:\n    print(error)"
    printed = subprocess.check_output([sys.executable, "-c", absent], text=True)
    assert "use `import gcx.torch`" in printed
    assert gcx.optim.SGD  # that one needs no import
    with pytest.raises(AttributeError, match=r"no attribute 'torhc'$"):
        gcx.torhc  # noqa: B018 - the access is the test


def test_every_module_is_documented_and_has_each_name_once(module: Any, api: str) -> None:
    assert re.search(rf"^# {module.__name__}$", api, re.MULTILINE)
    assert inspect.getdoc(module)
    assert public(module)
    assert len(module.__all__) == len(set(module.__all__))


def test_everything_public_is_documented_and_has_an_example(module: Any) -> None:
    missing = []
    for name, value in public(module).items():
        text = inspect.getdoc(value) or ""
        # Such a class is made by a function alone, which has the example.
        maker = re.search(rf"; `{module.__name__}\.(\w+)` returns (it|them)\.$", text, re.MULTILINE)
        if maker is not None:
            assert maker[1] in public(module)
        elif "\nExamples\n--------\n" not in text:
            missing.append(name)
        for argument in () if maker else inspect.signature(value).parameters:
            is_described = re.search(rf"^[\w, *]*\b{argument}\b", text, re.MULTILINE)
            if not (argument.startswith("_") or is_described):
                missing.append(f"{name}({argument})")
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(function) and not (method.startswith("_") or function.__doc__):
                missing.append(f"{name}.{method}")
    assert missing == []


def test_arrays_come_first_and_options_are_named() -> None:
    for function in (gcx.centralize, gcx.centralize_many):
        first, *rest = inspect.signature(function).parameters.values()
        assert first.kind is inspect.Parameter.POSITIONAL_ONLY
        assert {option.kind for option in rest} == {inspect.Parameter.KEYWORD_ONLY}


def test_types_and_version_are_those_of_the_distribution() -> None:
    assert resources.files("gcx").joinpath("py.typed").is_file()
    assert gcx.__version__ == metadata.version("gcx")
    assert "__version__" in gcx.__all__
