"""The mutants of a module, and a share of them that is drawn at random."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import unified_diff
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

__all__ = ["Mutant", "draw", "make"]


class Mutant(NamedTuple):
    """A change of one function: lines as they are, and as they become."""

    name: str
    before: str
    after: str


def make(path: Path, copy: Path) -> list[Mutant]:
    """Write a module with all of its mutants to `copy`, and list them.

    Those are left out that change the words of a text, or ``strict=``, on which no result depends.
    """
    from mutmut.mutation.file_mutation import mutate_file_contents

    mutated = mutate_file_contents(str(path), path.read_text())
    copy.write_text(mutated.code)
    lines = mutated.code.splitlines()

    def body(name: str) -> list[str]:
        span = mutated.line_span_by_function_name[name]
        return [line.strip().replace(name, "f") for line in lines[span.start - 1 : span.end]]

    mutants = []
    for name in mutated.mutant_names:
        original = body(f"{name.partition('__mutmut_')[0]}__mutmut_orig")
        changes = [*unified_diff(original, body(name), n=0, lineterm="")][2:]
        before, after = (" ".join(c[1:] for c in changes if c[0] == sign) for sign in "-+")
        if _plain(before) != _plain(after):
            module = ".".join(path.with_suffix("").parts)
            mutants.append(Mutant(f"{module}.{name}".replace(".__init__.", "."), before, after))
    return mutants


def draw(mutants: Iterable[Mutant], share: int, seed: int) -> list[Mutant]:
    """Draw at most `share` mutants; the same ones again where only other functions change."""

    def rank(mutant: Mutant) -> str:
        return sha1(f"{seed} {mutant.name}".encode(), usedforsecurity=False).hexdigest()

    return sorted(mutants, key=rank)[:share]


_LITERAL = re.compile(r'f?"(?:[^"\\]|\\.)*"')
_NEUTRAL = re.compile(r",? ?strict=\w+,? ?|,?\s*(?=\))|\s")


def _plain(code: str) -> str:
    """Strip code of texts with a space in them, and of ``strict=``."""
    return _NEUTRAL.sub("", _LITERAL.sub(lambda text: text[0] * (" " not in text[0]), code))
