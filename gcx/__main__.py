"""``python -m gcx`` shows which array libraries are here, and checks gcx on each of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from errno import EINVAL, ENOSPC, EPIPE
from functools import partial
from importlib.util import find_spec
from math import isfinite
from typing import Any, NamedTuple, Never, TypeVar
from warnings import catch_warnings, simplefilter

import gcx
from gcx._centralize import check_traits
from gcx.backends import LIBRARIES, load
from gcx.plan import aligned

T = TypeVar("T")

_DESCRIPTION = """\
Show which array libraries are installed, their devices, and how gcx computes on each of them. Then
centralize a few random gradients on every device, and compare the results with float64. Exit code:
0 if all is well, 1 if a result is wrong or a library does not load, 2 if a package is missing."""

INSTALL = {name: f'pip install "gcx[{name}]"' for name in LIBRARIES}
INSTALL["cupy"] = 'pip install "gcx[cupy13]" (CUDA 13) or "gcx[cupy12]" (CUDA 12)'
_REQUIRED = ("array-api-compat", "numpy")
_FOR_ADAPTERS = ("optax", "keras", "lightning", "transformers", "thinc")

_COLUMNS = ("library", "device", "dtype", "error", "limit", "verdict")
# The largest error, in units in the last place of the largest magnitude in the output unit.
_LIMITS = {"float32": 4.0, "float16": 0.51}

# The fan-in is written down, not derived from the layout, because the layout is under test.
_CASES: tuple[tuple[tuple[int, ...], str, tuple[int, ...]], ...] = (
    ((32, 64), "o...", (1,)),
    ((16, 8, 3, 3), "o...", (1, 2, 3)),
    ((3, 3, 8, 16), "...o", (0, 1, 2)),
    ((4, 16, 8), "bio", (1,)),
    ((3, 9001), "o...", (1,)),
    ((16,), "o...", ()),  # a bias comes back as it is
)


class LibraryInfo(NamedTuple):
    """One array library as it is on this machine."""

    name: str
    state: str  # "ok", "no device", "broken" or "not installed"
    version: str | None
    devices: tuple[str, ...]
    how: str  # its backend does the work; or the state, with an error or a remedy


def main(arguments: Sequence[str] | None = None) -> int:
    """Show, check, and return the exit code."""
    # Imported here, where Ctrl-C is expected.
    import json
    from argparse import ArgumentParser
    from pathlib import Path
    from platform import python_version

    parser = ArgumentParser(prog="python -m gcx", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON object, and no text")
    parser.add_argument("--version", action="version", version=f"gcx {gcx.__version__}")
    as_json = parser.parse_args(arguments).json
    if missing := [name for name in _REQUIRED if find_spec(name.replace("-", "_")) is None]:
        why = f"{' and '.join(missing)} missing: pip install {' '.join(missing)}"
        print(f"{parser.prog}: {why}", file=sys.stderr)
        if as_json:
            print(json.dumps({"ok": False, "error": why}))
        return 2
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # GPUs are shared with torch
    about = {
        "gcx": gcx.__version__,
        "folder": str(Path(gcx.__file__).parent),
        "python": python_version(),
        "adapters": {name: _version(name) for name in _FOR_ADAPTERS},
    }
    libraries = [look_up(name) for name in LIBRARIES]
    if not as_json:
        print("\n".join(_installed_lines(about, libraries)), flush=True)
    checks = [
        _check(library.name, device, dtype)
        for library in libraries
        for device in library.devices
        for dtype in _LIMITS
    ]
    is_broken = any(library.state == "broken" for library in libraries)
    ok = not is_broken and all(one["verdict"] == "ok" for one in checks)
    if as_json:
        found = {"libraries": [library._asdict() for library in libraries], "checks": checks}
        print(json.dumps({"ok": ok, **about, **found}, indent=2))
    else:
        print("\n".join(_check_lines(checks, ok=ok)))
    return 0 if ok else 1


def look_up(name: str) -> LibraryInfo:
    """Import a library out of `gcx.backends.LIBRARIES` if it is installed, and tell its state."""
    if find_spec(name) is None:
        return LibraryInfo(name, "not installed", None, (), f"not installed: {INSTALL[name]}")
    devices, error = attempt(lambda: tuple(load(name).devices()))
    if devices is None:
        return LibraryInfo(name, "broken", _version(name), (), f"broken: {error}")
    if not devices:
        return LibraryInfo(name, "no device", _version(name), (), "no device")
    library = load(name)
    how = _first_line(library)
    on_cuda = [device for device in devices if device.startswith("cuda")]
    if on_cuda and hasattr(library, "why_no_kernels"):
        how += "; on CUDA few launches of CUDA kernels for a list"
        for device in on_cuda:
            why, error = attempt(partial(_try_kernels, library, device))
            how += f"; not on {device}: {why or error}" if why or error else ""
    return LibraryInfo(name, "ok", _version(name), devices, how)


def _try_kernels(library: Any, device: str) -> str:
    """Launch a kernel on a CUDA device; return the reason if that fails."""
    grad = library.asarray([[1.0, 2.0]], "float32", device)
    with catch_warnings():
        simplefilter("ignore")  # of the reason
        gcx.centralize(grad)
    return str(library.why_no_kernels(grad))


def _first_line(backend: Any) -> str:
    return str(backend.__doc__ or "").partition("\n")[0].removesuffix(".")


def _version(module: str) -> str | None:
    from importlib import metadata

    loaded = getattr(sys.modules.get(module), "__version__", None)  # CuPy has several distributions
    return loaded or attempt(lambda: metadata.version(module))[0]


def _check(library: str, device: str, dtype: str) -> dict[str, Any]:
    error, why = attempt(lambda: _largest_error(library, device, dtype))
    if error is not None and not isfinite(error):
        error, why = None, "not finite"
    limit = _LIMITS[dtype]
    verdict = "ok" if error is not None and error <= limit else f"FAILED {why}".rstrip()
    return dict(zip(_COLUMNS, (library, device, dtype, error, limit, verdict), strict=True))


def _largest_error(library: str, device: str, dtype: str) -> float:
    """Centralize each gradient by itself and together with the others."""
    import numpy as np

    backend = load(library)
    rng = np.random.default_rng(0)
    values = [rng.normal(rng.normal(), 1, shape).astype(dtype) for shape, _, _ in _CASES]
    grads = [backend.asarray(x, dtype, device) for x in values]
    layouts = [layout for _, layout, _ in _CASES]
    alone = [gcx.centralize(g, layout=layout) for g, layout in zip(grads, layouts, strict=True)]
    results = [*alone, *gcx.centralize_many(grads, layouts=layouts)]
    errors = []
    for x, grad, result, case in zip(values * 2, grads * 2, results, _CASES * 2, strict=True):
        check_traits("the result", result, "the gradient", grad, ("shape", "dtype"))
        exact, fan_in = x.astype(np.float64), case[2]
        if fan_in:
            exact -= exact.mean(fan_in, keepdims=True)
        largest = np.maximum(np.abs(x), np.abs(exact)).max(fan_in, keepdims=True)
        ulp = np.spacing(largest.astype(dtype)).astype(np.float64)
        errors.append(np.max(np.abs(backend.to_numpy(result) - exact) / ulp))
    return float(np.max(errors))


def _installed_lines(about: dict[str, Any], found: Sequence[LibraryInfo]) -> list[str]:
    from gcx.backends import _array_api

    compat = f"array-api-compat {_version('array_api_compat')}"
    rows = [
        ("library", "version", "devices", "how"),
        *((one.name, one.version or "-", ", ".join(one.devices) or "-", one.how) for one in found),
        ("any other", compat, "-", _first_line(_array_api)),
    ]
    here = [f"{name} {version}" for name, version in about["adapters"].items() if version]
    first = f"gcx {about['gcx']} in {about['folder']}, Python {about['python']}"
    last = f"For adapters: {', '.join(here) or 'nothing is installed'}"
    return [first, "", *aligned(rows), "", last, ""]


def _check_lines(checks: Sequence[dict[str, Any]], *, ok: bool) -> list[str]:
    cells = [
        [f"{x:.2f}" if isinstance(x, float) else str(x or "-") for x in row.values()]
        for row in checks
    ]
    first = f"{len(_CASES)} random gradients a row, compared with float64. Error and limit in ulp"
    second = "of the largest magnitude in the output unit."
    last = "All is well." if ok else "FAILED: something above is wrong or broken."
    return [first, second, "", *aligned([_COLUMNS, *cells]), "", last]


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result and an empty text; or None and the error, on one line."""
    try:
        return call(), ""
    except Exception as error:  # noqa: BLE001 - a broken library raises anything at all
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]


def exit_after(command: Callable[[], int]) -> Never:
    """Run a program; Ctrl-C (130), a closed pipe (141) and a full disk (1) end it quietly."""
    try:
        try:
            code = command()
        finally:
            print(end="", flush=True)
    except KeyboardInterrupt:
        # After an interruption inside `exec`, Python would end by the signal and not by this code.
        os._exit(130)
    except OSError as error:
        if error.errno not in (EPIPE, EINVAL, ENOSPC):  # Windows calls a closed pipe EINVAL
            raise
        # Python flushes once more when it exits, and must not fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"cannot write: {error.strerror}" if error.errno == ENOSPC else 141)
    sys.exit(code)


if __name__ == "__main__":
    exit_after(main)
