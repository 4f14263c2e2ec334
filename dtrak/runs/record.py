"""What a finished run of `dtrak.attribute` says about itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .choices import check_counts
from .options import Options

GENERATED = "generated"


class ResultsError(ValueError):
    """A folder whose results cannot be used; the message says why."""


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest of a finished run, and what decided its model and data.

    Raises:
        FileNotFoundError: there is no such folder.
        ResultsError: it holds no finished run, or one of another version.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"a run must be an existing folder, got {folder}")
    contents = {}
    for name in ("manifest.json", "run.json"):
        file = folder / name
        if not file.is_file():
            raise ResultsError(
                f"{folder} must be a finished run of dtrak.attribute, got no {name} in it"
            )
        try:
            contents[name] = json.loads(file.read_text())
        except ValueError as error:
            raise ResultsError(f"{file} must be JSON, but is damaged: run again") from error
    manifest, deciding = contents["manifest.json"], contents["run.json"]
    _check_contents(folder, manifest, deciding)
    return manifest, deciding


def _check_contents(folder: Path, manifest: Any, deciding: Any) -> None:
    """Refuse a run whose files are JSON, but not what `dtrak.attribute` writes."""
    try:
        Options(**manifest["options"])
        for name in ("settings", "facts", "environment"):
            dict(manifest[name])
        if not all(isinstance(stage["name"], str) for stage in manifest["stages"]):
            raise TypeError
        sum(stage["seconds"] for stage in manifest["stages"])
        whole = isinstance(manifest["data"], str) and isinstance(deciding["model"], dict)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ResultsError(
            f"{folder} must be a run of this version of dtrak.attribute, but its manifest.json or "
            "run.json is not: run again"
        )


def check_runs(folders: Sequence[str | Path], output: Path) -> None:
    """Refuse runs that cannot be averaged, as far as they say it themselves.

    Raises:
        FileNotFoundError: there is no such folder.
        ResultsError: one holds no finished run, there are fewer than two or one twice, or
            ``output`` is no name of a file of scores.
    """
    if output.suffix != ".safetensors":
        raise ResultsError(f"--output must be a file *.safetensors, got {output}")
    if len({Path(folder).resolve() for folder in folders}) != len(folders) or len(folders) < 2:
        raise ResultsError(
            f"runs must be two or more, each given once, got {', '.join(map(str, folders))}"
        )
    for folder in folders:
        read_record(Path(folder))


def check_report(folder: Path, num_queries: int) -> None:
    """Refuse a report of nothing.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no query is to be shown.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"a run must be an existing folder, got {folder}")
    check_counts(num_queries=num_queries)
