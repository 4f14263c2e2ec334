"""Mistakes made in compiled code on purpose, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable

# what to look for, and what to put in its place
MISTAKES: dict[str, tuple[str, str]] = {
    "a barrier is left out": (r"bar\.sync\s+0;", ""),
    "a copy's wait is left out": (r"cp\.async\.wait_group\s+\d+;", ""),
    "a product's wait is left out": (r"wgmma\.wait_group\.sync\.aligned \d+;", ""),
    "a proxy fence is left out": (r"fence\.proxy\.async[.:\w]*;", ""),
    "a product's fence is left out": (r"wgmma\.fence\.sync\.aligned;", ""),
    "a load is not guarded": (r"@!?%p\d+ (ld\.global)", r"\1"),
    "a store is not guarded": (r"@!?%p\d+ (st\.global)", r"\1"),
    "a copy is not guarded": (r"(cp\.async\.c\w\S* \[[^;]*, 0x\w+), %r\d+;", r"\1;"),
    "a load is shifted by two bytes": (r"(ld\.global\S* \{[^}]*\}, \[ %rd\d+ \+ )0", r"\g<1>2"),
    "a store is shifted": (r"(st\.global\S* \[ %rd\d+ \+ )0", r"\g<1>268435456"),
    "a shared store is shifted": (r"(st\.shared\S*\s+\[%r\d+)(?:\+\d+)?\]", r"\g<1>+524288]"),
    "a shared load is shifted": (r"(ld\.shared\S*\s+\S.*?, \[%r\d+)(?:\+\d+)?\]", r"\g<1>+524288]"),
    "a copy's source is shifted": (
        r"(cp\.async\.c\w\S* \[ %r\d+ \+ 0 \], \[ %rd\d+ \+ )0",
        r"\g<1>4",
    ),
    "a copy's target is shifted": (r"(cp\.async\.c\w\S* \[ %r\d+ \+ )0", r"\g<1>4"),
    "a matrix load is shifted": (r"(ldmatrix\S*\s+\{[^}]*\}, \[%r\d+)(?:\+\d+)?\]", r"\g<1>+8]"),
}


def count(ptx: str, mistake: str) -> int:
    """Places where a mistake can be made."""
    return len(re.findall(MISTAKES[mistake][0], ptx))


def make(mistake: str, place: int) -> Callable[[str], str]:
    """An edit of PTX that makes a mistake in one place, counted from 0."""
    pattern, replacement = MISTAKES[mistake]

    def edit(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[place]
        return ptx[: found.start()] + found.expand(replacement) + ptx[found.end() :]

    return edit
