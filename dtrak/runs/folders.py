"""Output folders: each belongs to one run, and says what decided it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .files import LOCK_FILE, claim, expand_path, write_atomically


class OutputError(ValueError):
    """An output folder that belongs to something else; the message says what differs."""


@contextmanager
def alone_in(folder: Path, part: range | None = None) -> Iterator[None]:
    """Keep other commands from writing into an output folder; readers are not kept away.

    Args:
        folder: made if missing.
        part: as in `files.claim`.

    Raises:
        OutputError: another command writes there.
    """
    with claim(folder / LOCK_FILE, part=part) as is_ours:
        if not is_ours:
            raise OutputError(
                f"another command is at work in {folder}: wait until it has ended, or choose "
                "another --output"
            )
        yield


def refuse_inside(folder: Path, **sources: str | None) -> None:
    """Refuse an output folder whose pictures would be read as images of a source.

    Args:
        folder: of the output.
        sources: folders of images by the names of their options, or whatever else they are.

    Raises:
        OutputError: it lies in one, or is one.
    """
    for name, source in sources.items():
        given = None if source is None else expand_path(source)
        if given is None or not given.is_dir():
            continue
        if folder.resolve().is_relative_to(given.resolve()):
            raise OutputError(
                f"--output must not lie in the folder of --{name}, whose images it would join: "
                f"got {folder} in {given}"
            )


def is_unclaimed(folder: Path) -> bool:
    """Whether ``folder`` is missing, or empty but for locks and what a killed writer left."""
    return not folder.exists() or all(
        path.suffix == ".partial" or path.name == LOCK_FILE for path in folder.iterdir()
    )


def claim_folder(
    folder: Path,
    file_name: str,
    settings: dict[str, Any],
    held: ExitStack | None = None,
    part: range | None = None,
    also: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make an output folder ours, or refuse it when it belongs to another run.

    Args:
        folder: made if missing.
        file_name: of the JSON file in it that says what decided the run.
        settings: what decides this one, JSON-serialisable; kept under the key ``settings``.
        held: keeps other commands from writing there until it is closed; None keeps nobody away.
        part: of the work in the folder that is kept from others, as in `files.claim`; None for all.
        also: what is written beside the settings and decides nothing.

    Returns:
        What the file holds, after it was written if it was missing.

    Raises:
        OutputError: the folder is a file, holds something else, or a run with other settings (which
            are named); or another command is at work in it.
    """
    found = check_folder(folder, file_name, settings)
    if held is not None:
        held.enter_context(alone_in(folder, part))
        # another command may have made it its own in between
        found = check_folder(folder, file_name, settings)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    # as it will be read back: tuples are lists then
    content: dict[str, Any] = json.loads(json.dumps({"settings": settings, **(also or {})}))
    write_atomically(folder / file_name, json.dumps(content, indent=1).encode())
    return content


def check_folder(
    folder: Path, file_name: str, settings: dict[str, Any], *, partly: bool = False
) -> dict[str, Any] | None:
    """Refuse an output folder that `claim_folder` would refuse; nothing is written.

    Args:
        folder: as there.
        file_name: as there.
        settings: as there.
        partly: there are more, which are not known yet.

    Returns:
        What the file holds; None where it is missing.

    Raises:
        OutputError: as `claim_folder`.
    """
    file = folder / file_name
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--output must be a folder, got the file {folder}")
    # as it will be read back: tuples are lists then
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            there = dict(found["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(
                f"{file} is damaged: delete {folder} or choose another --output"
            ) from error
        if partly:
            there = {key: value for key, value in there.items() if key in settings}
        differing = describe_differences(there, settings)
        if differing:
            raise OutputError(
                f"{folder} holds another run: {differing}. Choose another --output, or delete it"
            )
        return found
    if not is_unclaimed(folder):
        raise OutputError(
            f"{folder} is not empty and holds no {file_name}: choose another --output"
        )
    return None


def describe_differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """``key is a there and b here`` for every differing key, nested keys dotted; or nothing."""
    differences = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            nested = describe_differences(a, b)
            differences += [f"{key}.{part}" for part in nested.split("; ")] if nested else []
        elif a != b:
            differences.append(f"{key} is {_short(a)} there and {_short(b)} here")
    return "; ".join(differences)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"
