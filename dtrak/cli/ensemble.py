"""Several models' scores of the same pictures, averaged: usually better than any one model's.

``python -m dtrak.ensemble runs/a runs/b … --output runs/mean.safetensors`` takes finished runs of
``dtrak.attribute`` that have the training images, the pictures (``--queries FOLDER``) and the
output function in common, each with its own model, features and damping.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..runs.choices import counted
from ..runs.record import check_runs
from ..runs.stated import Stated, argument, option
from .options import make_app


@dataclass(frozen=True)
class Options(Stated):
    """What the command line asked for."""

    runs: list[str] = argument(help="Folders of finished runs of dtrak.attribute.", is_path=True)  # noqa: RUF009
    output: str = option(
        help="File of the mean scores, *.safetensors; what was there is lost.", is_path=True
    )
    queries: str | None = option(
        None,
        help="Which set of queries of the first run, such as generated-1a2b3c4d; the others' set "
        "of the same pictures goes with it. Default: the only one they have in common.",
    )


def run(options: Options, console: Console) -> None:
    """Average the scores of several models.

    Draw the pictures with one model, and give the others its folder: --queries runs/a/generated.
    """
    check_runs(options.runs, Path(options.output))
    # as in dtrak.train
    from ..methods.ensemble import average_runs

    M, N = average_runs(options.runs, options.output, options.queries).shape
    console.print(
        f"{options.output}: mean scores of {counted(len(options.runs), 'model')}, "
        f"{counted(M, 'picture')} by {counted(N, 'training image')}",
        highlight=False,
        soft_wrap=True,
    )


app, main = make_app("dtrak.ensemble", Options, run)

if __name__ == "__main__":
    main()
