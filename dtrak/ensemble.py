"""Several models' scores of the same pictures, averaged: usually better than any one model's.

``python -m dtrak.ensemble runs/a runs/b … --output runs/mean.safetensors`` takes finished runs of
``dtrak.attribute`` that have the training images, the pictures (``--queries FOLDER``) and the
output function in common, each with its own model, features and damping.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # the imports below take seconds, in which Ctrl-C would end in a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from .console import reporting_errors, run_app
from .files import write_atomically
from .results import Attribution, ResultsError, load_attribution
from .scores import ensemble

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

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
    if output.suffix != ".safetensors":
        raise ResultsError(f"--output must be a file *.safetensors, got {output}")
    if len({Path(folder).resolve() for folder in folders}) != len(folders) or len(folders) < 2:
        raise ResultsError(
            f"runs must be two or more, each given once, got {', '.join(map(str, folders))}"
        )
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


@app.command()
def average(
    runs: Annotated[list[str], typer.Argument(help="Folders of finished runs of dtrak.attribute.")],
    output: Annotated[
        str, typer.Option(help="File of the mean scores, *.safetensors; what was there is lost.")
    ],
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Average the scores of several models.

    Draw the pictures with one model, and give the others its folder: --queries runs/a/generated.
    """
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        scores = average_runs(runs, output)
        M, N = scores.shape
        console.print(
            f"{output}: mean scores of {len(runs)} models, {M} pictures by {N} training images",
            highlight=False,
            soft_wrap=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.ensemble``."""
    run_app(app, "dtrak.ensemble", arguments)


if __name__ == "__main__":
    main()
