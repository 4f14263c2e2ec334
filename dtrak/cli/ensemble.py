"""Several models' scores of the same pictures, averaged: usually better than any one model's.

``python -m dtrak.ensemble runs/a runs/b … --output runs/mean.safetensors`` takes finished runs of
``dtrak.attribute`` that have the training images, the pictures (``--queries FOLDER``) and the
output function in common, each with its own model, features and damping.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..runs.console import reporting_errors, run_app
from ..runs.record import check_runs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
        check_runs(runs, Path(output))
        # as in dtrak.train
        from ..methods.ensemble import average_runs

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
