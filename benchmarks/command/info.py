"""``python -m benchmarks info``: the libraries found here, and how each is handled."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from benchmarks.command.libraries import LibraryInfo, look_up, path_of
from gcx._table import aligned
from gcx._version import __version__
from gcx.backends import LIBRARIES, _array_api

__all__ = ["InfoReport", "collect", "render"]


@dataclass(frozen=True)
class InfoReport:
    """Versions of this installation, and a row for each library."""

    ok: bool  # no library that is installed is broken
    gcx: str
    python: str
    libraries: tuple[LibraryInfo, ...]


def collect() -> InfoReport:
    """Look up every library that has a backend, and what serves all the others."""
    libraries = (*map(look_up, LIBRARIES), _any_other())
    return InfoReport(
        ok=all(library.state != "broken" for library in libraries),
        gcx=__version__,
        python=platform.python_version(),
        libraries=libraries,
    )


def _any_other() -> LibraryInfo:
    return LibraryInfo(
        "any other",
        "ok",
        version=f"array-api-compat {metadata.version('array-api-compat')}",
        path=path_of(_array_api.__doc__),
    )


def render(report: InfoReport) -> str:
    """Write the report as text."""
    rows = [("library", "version", "devices", "how"), *map(_cells, report.libraries)]
    heading = f"gcx {report.gcx}, Python {report.python}"
    return "\n".join([heading, "", *aligned(rows)])


def _cells(library: LibraryInfo) -> tuple[str, ...]:
    how = library.path if library.state == "ok" else library.condition
    return library.name, library.version or "-", ", ".join(library.devices) or "-", how
