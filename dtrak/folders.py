"""Output folders: each belongs to one run, and says what decided it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .features import describe_differences
from .files import write_atomically
from .runs import OutputError


def claim_folder(folder: Path, file_name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Make an output folder ours, or refuse it when it belongs to another run.

    Args:
        folder: made if missing.
        file_name: of the JSON file in it that says what decided the run.
        settings: what decides this one, JSON-serialisable; kept under the key ``settings``.

    Returns:
        What the file holds, after it was written if it was missing.

    Raises:
        OutputError: the folder is a file, holds something else, or a run with other settings (which
            are named).
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
        differing = describe_differences(there, settings)
        if differing:
            raise OutputError(
                f"{folder} holds another run: {differing}. Choose another --output, or delete it"
            )
        return found
    if folder.exists() and any(path.suffix != ".partial" for path in folder.iterdir()):
        raise OutputError(
            f"{folder} is not empty and holds no {file_name}: choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings}
    write_atomically(file, json.dumps(content, indent=1).encode())
    return content
