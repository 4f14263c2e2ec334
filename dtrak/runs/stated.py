"""An option, stated once: a field of a dataclass that is command line, signature and record."""

from __future__ import annotations

import os
from dataclasses import MISSING, Field, field, fields
from typing import Any

from .files import expand_path

_HELP, _FLAGS, _PANEL, _IS_ARGUMENT, _IS_PATH = "help", "flags", "panel", "is_argument", "is_path"


def option(
    default: Any = MISSING,
    *,
    help: str,
    flags: tuple[str, ...] = (),
    panel: str = "",
    is_path: bool = False,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value where it is not given; without one it must be.
        help: what it is for, in a sentence.
        flags: as it is typed, where that is not ``--name-of-the-field``.
        panel: heading under which the help lists it; empty for the first one.
        is_path: whether it is a path, or may be one; see `Stated`.
    """
    about = {_HELP: help, _FLAGS: flags, _PANEL: panel, _IS_PATH: is_path}
    return field(default=default, metadata=about)


def argument(default: Any = MISSING, *, help: str, is_path: bool = False) -> Any:
    """A field that is typed without a flag, at its place."""
    about = {_HELP: help, _IS_ARGUMENT: True, _IS_PATH: is_path}
    return field(default=default, metadata=about)


class Stated:
    """A dataclass of options, whose paths are normalised here and nowhere else: ``~`` is home.

    Raises:
        ValueError: as `files.expand_path`.
    """

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            if one.metadata.get(_IS_PATH) and value is not None:
                several = isinstance(value, list)
                found = [_expand(v) for v in value] if several else _expand(value)
                object.__setattr__(self, one.name, found)


def _expand(value: Any) -> Any:
    text = os.fspath(value)
    # a prompt may begin with ~ too
    if not text.startswith("~") or " " in text.split("/")[0]:
        return value
    return str(expand_path(text))


def stated(options: type[Any]) -> list[Field[Any]]:
    """The fields of a dataclass that are options, arguments first."""
    found = [one for one in fields(options) if _HELP in one.metadata]
    return sorted(found, key=lambda one: not one.metadata.get(_IS_ARGUMENT, False))
