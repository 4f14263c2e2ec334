"""One page to look at: each query beside its proponents and opponents, and how far to trust them.

``python -m dtrak.report runs/digits`` writes the page of a set of queries anew, with whatever LDS
and counterfactual retraining have been done since.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..runs.files import encode_text, write_atomically
from ..runs.record import NUM_QUERIES, REPORT, RUN_FILE, check_report, find_queries
from ..runs.stated import Stated, argument, option
from ..runs.usual import WHERE_NOW
from .options import make_app, typed_options

# rows of strips that fit on a page of paper
NUM_ROWS = 8


@dataclass(frozen=True)
class Options(Stated):
    """What `dtrak.report` was asked for."""

    run: str = argument(help="Folder of dtrak.attribute or dtrak.lds.", is_path=True)
    queries: str | None = option(
        None, help="Which of the run's sets of queries. Default: the only one."
    )
    lds: str | None = option(
        None,
        help="Run folder of dtrak.lds to show too. Default: the run itself, or lds-<name> beside "
        "it on the same images.",
        is_path=True,
    )
    counterfactual: str | None = option(
        None,
        help="Folder of dtrak.counterfactual to show too. Default: counterfactual in the run.",
        is_path=True,
    )
    data: str | None = option(**WHERE_NOW)
    num_queries: int = option(NUM_QUERIES, help="Queries that are shown, the first.")
    megabytes: float = option(
        20.0,
        help="Size of the page at most, in millions of bytes: what that leaves out is said in it.",
    )
    output: str | None = option(
        None,
        help="The HTML file. Default: report.html beside the scores of the queries.",
        is_path=True,
    )
    figures: str | None = option(
        None,
        help="Write figures for a paper to this folder, as PDF and PNG, and no page: strips of the "
        f"first {NUM_ROWS} queries (--num-queries), plots of LDS and counterfactuals.",
        is_path=True,
    )


def report(options: Options, console: Console) -> None:
    """Gather pictures, LDS and counterfactual retraining of a run into one HTML file."""
    run = Path(options.run)
    if options.output is not None:
        file = Path(options.output)
        if options.figures is not None:
            raise ValueError("--figures writes no page: leave out --output")
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(f"--output must be a file in an existing folder, got {file}")
    if options.figures is not None and Path(options.figures).is_file():
        raise ValueError(f"--figures must be a folder, got the file {options.figures}")
    check_report(run, options.num_queries, options.megabytes)
    is_attributed = (run / RUN_FILE).is_file()
    if options.output is None:
        place = find_queries(run, options.queries) if is_attributed else run
        file = place / REPORT
    # light until here, so that mistakes are said at once
    if options.figures is not None:
        _write_figures(options, run, Path(options.figures), console)
        return
    from ..pages.index import write_index
    from ..pages.report import gather_report

    page = gather_report(
        run,
        queries=options.queries,
        lds=options.lds,
        counterfactual=options.counterfactual,
        source=options.data,
        num_queries=options.num_queries,
        megabytes=options.megabytes,
        console=console,
    )
    write_atomically(file, encode_text(page))
    Console().print(f"report: {file}", soft_wrap=True, highlight=False)
    if is_attributed and options.output is None:
        Console().print(f"index: {write_index(run)}", soft_wrap=True, highlight=False)


def _write_figures(options: Options, run: Path, folder: Path, console: Console) -> None:
    from ..pages.report import write_run_figures

    num_queries = options.num_queries if "num_queries" in typed_options() else NUM_ROWS
    files = write_run_figures(
        folder,
        run,
        queries=options.queries,
        lds=options.lds,
        counterfactual=options.counterfactual,
        source=options.data,
        num_queries=num_queries,
        console=console,
    )
    for file in files:
        Console().print(f"figure: {file}", soft_wrap=True, highlight=False)


app, main = make_app("dtrak.report", Options, report)

if __name__ == "__main__":
    main()
