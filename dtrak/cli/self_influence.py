"""Which training images a model may have by heart, and which are there twice.

``python -m dtrak.self_influence runs/digits`` reads the features of a finished run of
``dtrak.attribute``; nothing is differentiated again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..runs.choices import check_counts
from ..runs.record import find_queries
from ..runs.stated import Stated, argument, option
from .options import make_app

_FILE = "self_influence.csv"


@dataclass(frozen=True)
class Options(Stated):
    """What the command line asked for."""

    run: str = argument("runs/digits", help="Finished run of dtrak.attribute.", is_path=True)
    queries: str | None = option(
        None, help="Which of the run's sets of queries says method and damping. Default: the only."
    )
    top_k: int = option(10, help="Images and pairs shown.")


def run(options: Options, console: Console) -> None:
    """List the training images with the highest self-influence, and the pairs most alike.

    All of them are in self_influence.csv beside the scores.
    """
    check_counts(top_k=options.top_k)
    find_queries(Path(options.run), options.queries)
    # light until here, so that mistakes are said at once
    from ..methods.self_influence import of_run, write_csv
    from ..pages.tables import Table
    from ..runs.results import load_attribution

    known = load_attribution(options.run, options.queries)
    found = of_run(known)
    file = known.results / _FILE
    write_csv(found, file)
    console, ids = Console(), found.ids
    highest = [
        (ids[row], f"{float(found.own[row]):.3f}")
        for row in found.own.argsort(descending=True)[: options.top_k].tolist()
    ]
    Table(("training image", "self-influence"), highest, "Most by themselves").show(console)
    rows = [
        (ids[one], ids[other], f"{likeness:.3f}")
        for one, other, likeness in found.pairs()[: options.top_k]
    ]
    columns = ("training image", "and", "likeness")
    Table(columns, rows, "Most alike", words=("and",)).show(console)
    console.print(f"all of them: {file}", soft_wrap=True, highlight=False)


app, main = make_app("dtrak.self_influence", Options, run)

if __name__ == "__main__":
    main()
