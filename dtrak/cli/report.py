"""One page to look at: each query beside its proponents and opponents, and how far to trust them.

``python -m dtrak.report runs/digits`` gathers what a run and its evaluations left into one
self-contained HTML file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..runs.console import reporting_errors, run_app
from ..runs.files import write_atomically
from ..runs.record import check_report

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Folder of dtrak.attribute or dtrak.lds.")],
    lds: Annotated[
        str | None,
        typer.Option(
            help="Run folder of dtrak.lds to show too. Default: the run itself, or lds-<name> "
            "beside it on the same images."
        ),
    ] = None,
    counterfactual: Annotated[
        str | None,
        typer.Option(
            help="Folder of dtrak.counterfactual to show too. Default: counterfactual in the run."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the training images lie now. Default: as in the run.")
    ] = None,
    num_queries: Annotated[int, typer.Option(help="Queries whose pictures are shown.")] = 16,
    output: Annotated[
        str | None, typer.Option(help="The HTML file. Default: results.html in the run.")
    ] = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Gather pictures, LDS and counterfactual retraining of a run into one HTML file."""
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        file = Path(output) if output else Path(run) / "results.html"
        if output and (file.is_dir() or not file.parent.is_dir()):
            raise ValueError(f"--output must be a file in an existing folder, got {file}")
        check_report(Path(run), num_queries)
        # as in dtrak.train
        from ..pages.report import gather_report

        page = gather_report(
            run,
            lds=lds,
            counterfactual=counterfactual,
            source=data,
            num_queries=num_queries,
            console=console,
        )
        write_atomically(file, page.encode())
        Console().print(f"report: {file}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.report``."""
    run_app(app, "dtrak.report", arguments)


if __name__ == "__main__":
    main()
