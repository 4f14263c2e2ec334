"""Several models' scores of the same pictures, averaged into a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..runs.files import expand_path, write_atomically
from ..runs.record import (
    MANIFEST,
    ResultsError,
    check_runs,
    find_queries,
    list_queries,
    read_json,
)
from ..runs.results import Attribution, load_attribution
from .scores import ensemble

_OUTPUT_FUNCTION = "output function"
_SHARED = {
    "data": "training images",
    "captions": "captions of the training images",
    "queries": "pictures (--queries)",
}


def average_runs(
    folders: Sequence[str | Path], output: str | Path, queries: str | None = None
) -> Tensor:
    """Average the scores of several runs of `dtrak.attribute`, and write them as one of them would.

    Args:
        folders: of finished runs, at least two, on the same images with the same output function.
        queries: which set of queries of the first run, as `record.find_queries`; the others' set of
            the same pictures, whatever it is called there, goes with it. None for the only one that
            all of them have.
        output: a ``.safetensors`` file; what takes a run's scores takes it too, such as
            ``--methods mean=FILE`` of `dtrak.counterfactual`.

    Returns:
        ``[M, N]`` float32, positive for proponents.

    Raises:
        FileNotFoundError: there is no such folder.
        ResultsError: one holds no finished run, the runs differ in what they must share, there are
            fewer than two or one twice, or ``output`` is no name of such a file.
    """
    output = Path(output)
    check_runs(folders, output)
    names = _common_queries([expand_path(folder) for folder in folders], queries)
    runs = [load_attribution(folder, name) for folder, name in zip(folders, names, strict=True)]
    for run in runs[1:]:
        _check_alike(runs[0], run)
    scores = ensemble(run.scores for run in runs)
    settings = runs[0].manifest["settings"]
    about: dict[str, Any] = {
        "rows": json.dumps(runs[0].query_ids),
        "columns": json.dumps(runs[0].train_ids),
        "settings": json.dumps(
            {
                "method": settings["method"],
                _OUTPUT_FUNCTION: settings.get(_OUTPUT_FUNCTION),
                "mean of": [run.manifest["settings"] for run in runs],
            }
        ),
        "sign": "positive = proponent: its presence lowers the models' loss on the query",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, save({"scores": scores.contiguous()}, metadata=about))
    return scores


def _common_queries(folders: Sequence[Path], wanted: str | None) -> list[str | None]:
    """Names of the sets of queries of all runs that are of the same pictures, scored alike."""
    sets = [_pictures_of(folder) for folder in folders]
    if wanted is not None:
        chosen = find_queries(folders[0], wanted)
        key = next(key for key, name in sets[0].items() if list_queries(folders[0])[name] == chosen)
        # a run without it is told apart below, by what differs
        return [found.get(key, next(iter(found.values()))) for found in sets]
    common = [key for key in sets[0] if all(key in found for found in sets)]
    if len(common) == 1:
        return [found[common[0]] for found in sets]
    if common:
        names = ", ".join(sets[0][key] for key in common)
        raise ResultsError(
            f"--queries must name one of the sets of queries that all of them have ({names}, as "
            f"{folders[0]} calls them), got none"
        )
    # nothing in common: what differs is said of the only ones there are
    return [next(iter(found.values())) if len(found) == 1 else None for found in sets]


def _pictures_of(run: Path) -> dict[tuple[str, str], str]:
    """Sets of queries of a run by their pictures and how they were scored."""
    found = {}
    for name, folder in list_queries(run).items():
        manifest = read_json(folder / MANIFEST)
        found[str(manifest.get("queries")), name.partition("/")[2]] = name
    return found


def _check_alike(first: Attribution, other: Attribution) -> None:
    for key, name in _SHARED.items():
        hashes = first.manifest.get(key), other.manifest.get(key)
        if key == "queries" and None in hashes:
            old = first if hashes[0] is None else other
            raise ResultsError(
                f"{old.folder} must say which pictures it explains, as runs of older versions do "
                "not: run dtrak.attribute on it again"
            )
        if hashes[0] != hashes[1]:
            raise ResultsError(
                f"{other.folder} must have the {name} of {first.folder}, got others: scores of "
                "different images have no mean"
            )
    for key in ("method", _OUTPUT_FUNCTION, "whitening"):
        values = [run.manifest["settings"].get(key, "none") for run in (first, other)]
        if values[0] != values[1]:
            raise ResultsError(
                f"{other.folder} must have the {key} of {first.folder}, {values[0]}, got "
                f"{values[1]}"
            )
