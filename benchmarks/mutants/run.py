"""Make mutants of gcx, run the tests that reach each, and write down which ones survive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.mutants.make import Mutant, draw, make
from benchmarks.mutants.report import survivors, table

__all__ = ["main"]

_FOLDER = Path("mutants")
_RESULTS = "results.jsonl"
GROUPS = Path(__file__).with_name("groups.toml")
_COPIED = ("gcx", "tests", "benchmarks", "docs", "README.md", "noxfile.py", "pyproject.toml")


def main(arguments: Sequence[str]) -> int:
    """Run a campaign, or a part of one: results add up, and what was killed is not run again."""
    parser = ArgumentParser(prog="python -m benchmarks mutants", description=__doc__)
    for option, kind, default, text in (
        ("only", str, "*", "modules, such as 'torch.*'"),
        ("share", int, 60, "mutants of a module, drawn at random; 0 runs none"),
        ("seed", int, 0, "of the draw"),
    ):
        parser.add_argument(f"--{option}", type=kind, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write mutants.md and .txt")
    options = parser.parse_args(arguments)
    groups = tomllib.loads(GROUPS.read_text(encoding="utf-8")).values()
    modules = [*dict.fromkeys(m for group in groups for m in group["modules"].split())]
    chosen = [module for module in modules if fnmatch(module, options.only)]
    if not chosen:
        parser.error(f"--only {options.only} is none of {', '.join(modules)}")
    for name in _COPIED:
        copy = shutil.copy2 if Path(name).is_file() else _copy_folder
        copy(name, _FOLDER / name)
    made: dict[str, list[Mutant]] = {}
    for module in sorted(chosen):
        path = Path("gcx", *module.split(".")).with_suffix(".py")
        made[module] = make(path, _FOLDER / path)
    for group in groups:
        modules = [module for module in group["modules"].split() if module in made]
        drawn = (draw(made[module], options.share, options.seed) for module in modules)
        _run([mutant for mutants in drawn for mutant in mutants], group)
    killers = _read()
    print("\n".join(table(made, killers)))
    if options.write:
        texts = {"mutants.md": table(made, killers), "mutants.txt": survivors(made, killers)}
        for name, lines in texts.items():
            (options.write / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _copy_folder(name: str, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(name, copy, ignore=shutil.ignore_patterns("__pycache__", "_build"))


def _run(mutants: Iterable[Mutant], group: Mapping[str, str]) -> None:
    killers = _read()
    left = [mutant for mutant in mutants if not killers.get(mutant)]
    files = [f"tests/{name}.py" for name in group["tests"].split()]
    backends = f"--backends={group['libraries']}"
    command = [sys.executable, "-m", "benchmarks.mutants.forks", _RESULTS, backends, *files]
    environment = os.environ | {"PYTHONPATH": str(_FOLDER.absolute()), "OMP_NUM_THREADS": "1"}
    if left:
        text = json.dumps(left)
        subprocess.run(command, input=text, text=True, cwd=_FOLDER, env=environment, check=True)


def _read() -> dict[Mutant, str | None]:
    """Read the killer of each mutant; the last result counts."""
    path = _FOLDER / _RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Mutant(*mutant): killer for mutant, killer in map(json.loads, lines)}
