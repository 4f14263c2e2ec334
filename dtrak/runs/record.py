"""What a finished run of `dtrak.attribute` says about itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..methods import DEFAULT
from .choices import check_counts
from .files import plain_stem
from .folders import Record
from .options import Options

GENERATED, VALIDATION = "generated", "validation"
# what decided a run's model and data, and how it is run again; in its folder
RUN_FILE = "run.json"
RUN = Record(RUN_FILE)
# of a set of queries, in its folder
QUERIES, MANIFEST, SCORES = "queries", "manifest.json", "scores.safetensors"
REPORT, PICTURE = "report.html", "report.png"
# that a page shows
NUM_QUERIES = 100


class ResultsError(ValueError):
    """A folder whose results cannot be used; the message says why."""


def results_folder(run: Path, queries: str, fingerprint: str, variant: str) -> Path:
    """Where the results of a set of queries go: no set overwrites another.

    Args:
        run: folder of the run.
        queries: as ``--queries`` names them.
        fingerprint: of the queries.
        variant: how they were scored; the default has no folder of its own.
    """
    stem = queries if queries in (GENERATED, VALIDATION) else plain_stem(queries) or "queries"
    if stem != queries and stem in (GENERATED, VALIDATION):
        # a folder of that name is something else than what the word stands for
        stem = f"{stem}-folder"
    folder = run / QUERIES / f"{stem}-{fingerprint[:8]}"
    return folder if variant == DEFAULT else folder / variant


def list_queries(run: Path) -> dict[str, Path]:
    """Folders with results in a run, by name; those of another method are ``name/method``."""
    found = sorted((run / QUERIES).glob(f"*/{MANIFEST}"))
    found += sorted((run / QUERIES).glob(f"*/*/{MANIFEST}"))
    folders = (file.parent for file in found)
    return {folder.relative_to(run / QUERIES).as_posix(): folder for folder in folders}


def find_queries(run: Path, name: str | None = None) -> Path:
    """The folder of one set of queries.

    Args:
        run: folder of a run.
        name: of the folder in ``queries/``, whole or as much as tells it from the others; None for
            the only one there is.

    Raises:
        FileNotFoundError: there is no such run.
        ResultsError: it has no finished results, none of that name, or several that fit.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"a run must be an existing folder, got {run}")
    folders = list_queries(run)
    if not folders:
        raise ResultsError(
            f"{run} must be a finished run of dtrak.attribute, got no {QUERIES}/*/{MANIFEST} in it"
        )
    fitting = [key for key in folders if name is None or key.startswith(name)]
    if len(fitting) > 1:
        # the name of a set is the start of its other methods' names, too
        sets = [key for key in fitting if "/" not in key]
        fitting = [name] if name in folders else sets or fitting
    if len(fitting) == 1:
        return folders[fitting[0]]
    got = "none" if name is None else repr(name)
    raise ResultsError(
        f"--queries must name one of the sets of queries in {run}, {', '.join(folders)}: got {got}"
    )


def read_record(folder: Path, queries: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest of a finished set of queries, and what decided its run's model and data.

    Args:
        folder: of the run.
        queries: as `find_queries`.

    Raises:
        FileNotFoundError: there is no such folder.
        ResultsError: it holds no finished run, or one of another version.
    """
    results = find_queries(folder, queries)
    manifest, run = read_json(results / MANIFEST), read_json(folder / RUN_FILE)
    _check_contents(results, manifest, run)
    return manifest, run["settings"]


def read_json(file: Path) -> Any:
    """What a file of a run holds.

    Raises:
        ResultsError: it is missing, or damaged.
    """
    if not file.is_file():
        raise ResultsError(
            f"{file.parent} must be a finished run of dtrak.attribute, got no {file.name} in it"
        )
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ResultsError(f"{file} must be JSON, but is damaged: run again") from error


def _check_contents(folder: Path, manifest: Any, run: Any) -> None:
    """Refuse a run whose files are JSON, but not what `dtrak.attribute` writes."""
    try:
        Options(**manifest["options"])
        for name in ("settings", "facts", "environment"):
            dict(manifest[name])
        if not all(isinstance(stage["name"], str) for stage in manifest["stages"]):
            raise TypeError
        sum(stage["seconds"] for stage in manifest["stages"])
        model = run["settings"]["model"]
        whole = isinstance(manifest["data"], str) and isinstance(model, dict)
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
    for folder in map(Path, folders):
        read_record(folder, next(iter(list_queries(folder)), None))


def check_report(folder: Path, num_queries: int, megabytes: float) -> None:
    """Refuse a report of nothing.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no query is to be shown, or the page has no room for one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"a run must be an existing folder, got {folder}")
    check_counts(num_queries=num_queries)
    if not megabytes >= 1:
        raise ValueError(f"--megabytes must be at least 1, got {megabytes:g}")
