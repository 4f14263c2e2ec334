"""Tables between two markers of a page, made from rows of results and checked against them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# packaged benchmarks that questions of accuracy are put to
PRESETS = ("digits", "cifar2-16")


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        page: file under the repository.
        marker: word of the comments around it.
        make: its lines, without the markers.
    """

    page: Path
    marker: str
    make: Callable[[], list[str]]

    def rewritten(self, page: str) -> str:
        """The page with its table replaced."""
        return replace_table(page, self.marker, self.make())

    def bring_up_to_date(self, *, only_check: bool) -> None:
        """Rewrite the page, or end with a message if that would change it."""
        old = self.page.read_text()
        new = self.rewritten(old)
        if new == old:
            return
        if only_check:
            name = self.page.relative_to(ROOT)
            sys.exit(f"{name} does not match benchmarks/results: run with --docs")
        self.page.write_text(new)


def markers(marker: str) -> tuple[str, str]:
    """The comments before and after a table."""
    return f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"


def replace_table(page: str, marker: str, lines: list[str]) -> str:
    """The page with what is between its markers replaced."""
    begin, end = markers(marker)
    before, rest = page.split(begin)
    return before + "\n".join([begin, *lines, end]) + rest.split(end)[1]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a file, if there is one; a line that a stopped process left unfinished is dropped."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def newest(results: Path) -> dict[str, Any]:
    """The last row of a results file."""
    return json.loads(results.read_text().splitlines()[-1])


def run(
    table: Table,
    description: str | None,
    measure: Callable[..., None],
    *,
    folder: Path | None = None,
    presets: Sequence[str] = (),
) -> None:
    """The command of a page: measure (told whether to record, and whether it is a rehearsal).

    Args:
        table: what ``--docs`` rewrites and ``--check`` compares.
        description: of the command.
        measure: given ``--record`` and ``--smoke``, then what of ``--folder``, ``--preset`` and
            ``--data`` there is; a ValueError of it ends the command with its message.
        folder: default of ``--folder``, where work is kept; None for a command that keeps none, or
            of ``runs/<preset>-whitening`` where there are presets.
        presets: choices of ``--preset``, the first by default.
    """
    parser = argparse.ArgumentParser(description=description)
    for flag in ("record", "smoke", "docs", "check"):
        parser.add_argument(f"--{flag}", action="store_true")
    if folder is not None or presets:
        parser.add_argument("--folder", type=Path, default=folder)
    if presets:
        parser.add_argument("--preset", choices=presets, default=presets[0])
        parser.add_argument("--data", help="where the preset's data set lies, as for dtrak.lds")
    options = parser.parse_args()
    if options.docs or options.check:
        table.bring_up_to_date(only_check=options.check)
    else:
        kept = [options.folder] if folder is not None else []
        if presets:
            place = options.folder or Path("runs") / f"{options.preset}-whitening"
            kept = [place, options.preset, options.data]
        try:
            measure(options.record and not options.smoke, options.smoke, *kept)
        except ValueError as error:
            sys.exit(f"error: {error}")


def record(results: Path, row: dict[str, Any]) -> None:
    """Append a row with what its figures depend on."""
    from rows import environment

    with results.open("a") as file:
        file.write(json.dumps(row | environment()) + "\n")
