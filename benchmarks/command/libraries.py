"""What is known of an array library before its first array: version, devices, state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from benchmarks.command.attempt import attempt
from benchmarks.command.left_out import LeftOut
from gcx.backends import load

__all__ = ["INSTALL", "LibraryInfo", "look_up", "path_of", "unusable"]

INSTALL = {
    "numpy": 'pip install "gcx[numpy]"',
    "torch": 'pip install "gcx[torch]"',
    "jax": 'pip install "gcx[jax]"',
    "cupy": 'pip install "gcx[cupy13]" (CUDA 13) or "gcx[cupy12]" (CUDA 12)',
}


@dataclass(frozen=True)
class LibraryInfo:
    """One array library as it is on this machine."""

    name: str
    state: str  # "ok", "no device", "broken" or "not installed"
    version: str | None = None
    devices: tuple[str, ...] = ()
    path: str = ""  # how its backend does the work
    detail: str = ""  # the error of a broken library; what installs one that is missing

    @property
    def condition(self) -> str:
        """State and detail in words."""
        return f"{self.state}: {self.detail}" if self.detail else self.state


def look_up(name: str) -> LibraryInfo:
    """State of one of `gcx.backends.LIBRARIES`; imports it if it is installed."""
    if find_spec(name) is None:
        return LibraryInfo(name, "not installed", detail=INSTALL[name])
    version = _version(name)
    library, error = attempt(lambda: load(name))
    if library is None:
        return LibraryInfo(name, "broken", version, detail=error)
    path = path_of(library.__doc__)
    devices, error = attempt(library.devices)
    if devices is None:
        return LibraryInfo(name, "broken", version, path=path, detail=error)
    if name == "torch" and any(device.startswith("cuda") for device in devices):
        path = f"{path}; {_torch_on_cuda()}"
    return LibraryInfo(name, "ok" if devices else "no device", version, tuple(devices), path)


def _torch_on_cuda() -> str:
    """Whether the kernels run on CUDA devices, which they are tried on for that."""
    why_not, error = attempt(_why_no_kernels)
    if why_not or error:
        return f"on CUDA, too: {why_not or error}"
    return "on CUDA one launch of a Triton kernel for each dtype"


def _why_no_kernels() -> str:
    from gcx.backends import _torch_cuda

    return _torch_cuda.why_not()


def unusable(libraries: Iterable[LibraryInfo]) -> list[LeftOut]:
    """List those that are not here, have no device, or are broken, which alone is a failure."""
    return [
        LeftOut(library.state != "broken", library.name, library.condition)
        for library in libraries
        if library.state != "ok"
    ]


def path_of(doc: str | None) -> str:
    """First line of the documentation of a backend, which says how it does its work."""
    return (doc or "").partition("\n")[0].removesuffix(".")


def _version(module: str) -> str | None:
    """Version of whatever distribution brought a module: CuPy has one for each CUDA."""
    distributions = metadata.packages_distributions().get(module)
    return metadata.version(distributions[0]) if distributions else None
