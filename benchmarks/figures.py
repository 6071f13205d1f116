"""Count the lines, functions, imports and frames of gcx, and time its import and dispatch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from gcx.plan import aligned

__all__ = ["cycles", "figures", "function_lengths", "imports_between", "main", "upward_imports"]

_ROOT = Path(__file__).parents[1]
_LONGEST_FILE = 350

# The layers, from the bottom: a module imports none that stands above it. The first entry that a
# module's name begins with, behind "gcx.", counts; all others are adapters.
_LAYERS = (
    ("_compat", "_frameworks", "_memory", "_names", "layout", "plan"),
    ("backends",),
    ("_dispatch",),
    ("_centralize", "_decisions", "_means", "_options", "_rules"),
)


def main(arguments: Sequence[str]) -> int:
    """Print the figures."""
    parser = ArgumentParser(prog="python -m benchmarks figures", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object, and no text")
    options = parser.parse_args(arguments)
    found = figures()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(aligned(_rows(found))))
    return 0


def figures() -> dict[str, Any]:
    """Work out every figure, by name."""
    wheel = [*_python_files("gcx"), *(_ROOT / "gcx").rglob("*.cu")]
    tests = [
        path
        for path in _python_files("tests")
        if path.relative_to(_ROOT).parts[1] not in ("tools", "paper")
    ]
    modules = {_module(path): ast.parse(_text(path)) for path in _python_files("gcx")}
    lengths = sorted(n for tree in modules.values() for n in function_lengths(tree))
    imports = imports_between(modules, at_run_time=False)
    at_run_time = imports_between(modules, at_run_time=True)
    found: dict[str, Any] = {
        "lines in the wheel, CUDA and docstrings included": sum(map(_lines, wheel)),
        f"files over {_LONGEST_FILE} lines": [
            f"{path.relative_to(_ROOT)}: {_lines(path)}"
            for path in sorted(wheel)
            if _lines(path) > _LONGEST_FILE
        ],
        "files in gcx": len(wheel),
        "files in gcx/torch": len(_python_files("gcx/torch")),
        "files in gcx/optax": len(_python_files("gcx/optax")),
        "imports that run upwards": upward_imports(imports),
        "import cycles": cycles(at_run_time),
        "import cycles, of types too": cycles(imports),
        "functions": len(lengths),
        "lines of a function, median": median(lengths),
        "lines of a function, 90%": quantiles(lengths, n=10)[-1],
        "lines of a function, longest": lengths[-1],
        "lines of tests, without tools and paper": sum(map(_lines, tests)),
        "import gcx, ms": round(_import_milliseconds(), 1),
    }
    if find_spec("numpy"):
        from benchmarks.cpu.overhead import dispatch_nanoseconds

        found["from an array to its backend, ns"] = round(dispatch_nanoseconds())
    if find_spec("torch"):
        from benchmarks.frames import frames_of_a_step
        from benchmarks.gpu.host import launch_microseconds

        found["centralize_many, 54 tensors, launch stood in, us"] = round(launch_microseconds(), 1)
        frames = frames_of_a_step()
        found["frames of a CPU step in gcx"] = len(frames.calls)
        found["frames above the backend"] = frames.above_the_backend
        found["files of these frames"] = frames.files
    return found


def function_lengths(tree: ast.AST) -> Iterator[int]:
    """Count the lines of each function's body without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node, clean=False) else node.body
            yield (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def imports_between(modules: Mapping[str, ast.Module], *, at_run_time: bool) -> dict[str, set[str]]:
    """For each module, find the modules of gcx that it imports.

    `at_run_time` leaves out imports for types. Imports inside functions count. A name that a
    package re-exports counts as an import of the package; ``from gcx import layout`` imports the
    module.
    """
    return {
        name: {
            target
            for node in _walk(tree, skip_types=at_run_time)
            for target in _targets(node, modules)
            if target != name
        }
        for name, tree in modules.items()
    }


def upward_imports(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """List the imports of a module in a layer above the importing one."""
    return [
        f"{name} -> {target}"
        for name, targets in sorted(imports.items())
        for target in sorted(targets)
        if not _is_door(name) and not _is_door(target) and _layer(target) > _layer(name)
    ]


def cycles(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """List the groups of modules of which each imports each, over whatever other modules."""
    reach = {name: _reachable(name, imports) for name in imports}
    groups = {
        tuple(sorted({name, *(other for other in reach[name] if name in reach[other])}))
        for name in imports
        if name in reach[name]
    }
    return [" <-> ".join(group) for group in sorted(groups)]


def _reachable(start: str, imports: Mapping[str, Iterable[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(imports[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports[name]
    return found


def _walk(node: ast.AST, *, skip_types: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not (skip_types and is_for_types):
            yield from _walk(child, skip_types=skip_types)


def _targets(node: ast.AST, modules: Mapping[str, object]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            names = (f"{node.module}.{alias.name}", node.module)
            yield from [name for name in names if name in modules][:1]


def _is_door(name: str) -> bool:
    """Tell the modules that users start from, which import what they offer."""
    return name in ("gcx", "gcx.__main__")


def _layer(name: str) -> int:
    inner = name.removeprefix("gcx.")
    for height, names in enumerate(_LAYERS):
        if any(inner == one or inner.startswith(f"{one}.") for one in names):
            return height
    return len(_LAYERS)


def _import_milliseconds(processes: int = 15) -> float:
    """Time ``import gcx`` in fresh processes, and take away the time of Python itself."""
    bare: list[float] = []
    whole: list[float] = []
    for _ in range(processes):
        for times, code in ((bare, "pass"), (whole, "import gcx")):
            start = perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)
            times.append(perf_counter() - start)
    return 1e3 * (median(whole) - median(bare))


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if not isinstance(value, (list, tuple)):
            yield name, str(value)
            continue
        yield name, str(len(value))
        yield from (("", str(item)) for item in value)


def _python_files(folder: str) -> list[Path]:
    return sorted((_ROOT / folder).rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _lines(path: Path) -> int:
    return len(_text(path).splitlines())
