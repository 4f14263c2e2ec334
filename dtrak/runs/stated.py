"""An option, stated once: a field of a dataclass that is command line, signature and record."""

from __future__ import annotations

from dataclasses import MISSING, Field, field, fields
from typing import Any

_HELP, _FLAGS, _PANEL, _IS_ARGUMENT = "help", "flags", "panel", "is_argument"


def option(
    default: Any = MISSING,
    *,
    help: str,
    flags: tuple[str, ...] = (),
    panel: str = "",
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value where it is not given; without one it must be.
        help: what it is for, in a sentence.
        flags: as it is typed, where that is not ``--name-of-the-field``.
        panel: heading under which the help lists it; empty for the first one.
    """
    return field(default=default, metadata={_HELP: help, _FLAGS: flags, _PANEL: panel})


def argument(default: Any = MISSING, *, help: str) -> Any:
    """A field that is typed without a flag, at its place."""
    return field(default=default, metadata={_HELP: help, _IS_ARGUMENT: True})


def stated(options: type[Any]) -> list[Field[Any]]:
    """The fields of a dataclass that are options, arguments first."""
    found = [one for one in fields(options) if _HELP in one.metadata]
    return sorted(found, key=lambda one: not one.metadata.get(_IS_ARGUMENT, False))
