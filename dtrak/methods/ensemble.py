"""Several models' scores of the same pictures, averaged into a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..runs.files import write_atomically
from ..runs.record import ResultsError, check_runs
from ..runs.results import Attribution, load_attribution
from .scores import ensemble

_OUTPUT_FUNCTION = "output function"
_SHARED = {
    "data": "training images",
    "captions": "captions of the training images",
    "queries": "pictures (--queries)",
}


def average_runs(folders: Sequence[str | Path], output: str | Path) -> Tensor:
    """Average the scores of several runs of `dtrak.attribute`, and write them as one of them would.

    Args:
        folders: of finished runs, at least two, on the same images with the same output function.
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
    runs = [load_attribution(folder) for folder in folders]
    for run in runs[1:]:
        _check_alike(runs[0], run)
    scores = ensemble(run.scores for run in runs)
    settings = runs[0].manifest["settings"]
    about: dict[str, Any] = {
        "rows": json.dumps(runs[0].query_ids),
        "columns": json.dumps(runs[0].train_ids),
        "settings": json.dumps(
            {
                _OUTPUT_FUNCTION: settings[_OUTPUT_FUNCTION],
                "mean of": [run.manifest["settings"] for run in runs],
            }
        ),
        "sign": "positive = proponent: its presence lowers the models' loss on the query",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, save({"scores": scores.contiguous()}, metadata=about))
    return scores


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
    functions = [run.manifest["settings"][_OUTPUT_FUNCTION] for run in (first, other)]
    if functions[0] != functions[1]:
        raise ResultsError(
            f"{other.folder} must have the {_OUTPUT_FUNCTION} of {first.folder}, {functions[0]}, "
            f"got {functions[1]}"
        )
