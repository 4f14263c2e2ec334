"""Time and peak memory of solving synthetic features from disk, against their size.

``python benchmarks/store_growth.py --record`` appends a row per size that
benchmarks/results/store_growth.jsonl lacks, ``--docs`` rewrites the table of docs/scale.md
and its curves, ``--check`` only says whether they are up to date. A store of every size that the
disk has room for is made in ``--folder``, and deleted once it is solved.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import plots
import torch
from matplotlib.figure import Figure
from pages import ROOT, Table, read_rows, record, run

from dtrak.features.packing import packed_bytes
from dtrak.features.store import FeatureStore
from dtrak.pages import tables
from dtrak.runs.measure import StageClock
from dtrak_kernels.ridge import RidgeSolver

RESULTS = ROOT / "benchmarks" / "results" / "store_growth.jsonl"
PICTURE = ROOT / "docs" / "store_growth.svg"
FOLDER = Path("runs") / "store-growth"
# a Gram of 8 MB, so that what grows are the rows
WIDTH, QUERIES, TOP = 1024, 16, 10
SIZES = {
    "float32": (2**14, 2**16, 2**18, 2**20, 5_000_000, 2**15, 2**17, 2**19, 2**21),
    "int8": (2**14, 2**16, 2**18, 2**20),
}
CURVES = {
    "processor seconds": lambda row: row["cpu"],
    "peak beyond what was there, MB": lambda row: (row["peak_bytes"] - row["before_bytes"]) / 1e6,
}
# free on disk beside the store
_ROOM = 2 * 2**30


def make(folder: Path, rows: int, dtype: str) -> FeatureStore:
    """A store of random rows whose columns have unlike sizes."""
    ids = [str(row) for row in range(rows)]
    store = FeatureStore.open(folder, {"synthetic": rows}, ids, WIDTH, 1, dtype)
    sizes = torch.logspace(0, -2, WIDTH)
    for shard in store.missing():
        part = store.rows(shard)
        generator = torch.Generator().manual_seed(shard)
        store.write(shard, torch.randn(part.stop - part.start, WIDTH, generator=generator) * sizes)
    return store


def solve(folder: Path) -> dict[str, Any]:
    """What one process takes for top-k of a store, in seconds and bytes."""
    torch.set_num_threads(1)
    clock = StageClock(torch.device("cpu"))
    with clock.stage("open"):
        store = FeatureStore.read(folder)
    queries = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(1))
    # what is resident before, the store's manifest included
    with clock.stage("before"):
        pass
    cpu = time.process_time()
    with clock.stage("solve"):
        solver = RidgeSolver(store)
        solver.top_k(queries, TOP, solver.mean_squared_norm())
    opened, before, solved = clock.stages
    return {
        "open_seconds": opened.seconds,
        "seconds": solved.seconds,
        "cpu": time.process_time() - cpu,
        "method": solver.method,
        "before_bytes": before.peak_bytes,
        "peak_bytes": solved.peak_bytes,
    }


def measure_and_record(is_recorded: bool, smoke: bool, folder: Path) -> None:
    """Append what is missing; without ``--record`` only print it."""
    done = {(row["N"], row["dtype"]) for row in read_rows(RESULTS)}
    for dtype, sizes in SIZES.items():
        for rows in (2**11,) if smoke else sizes:
            place = folder / f"{rows}-{dtype}"
            size = rows * packed_bytes(WIDTH, dtype)
            folder.mkdir(parents=True, exist_ok=True)
            if (rows, dtype) in done or size + _ROOM > shutil.disk_usage(folder).free:
                continue
            make(place, rows, dtype)
            # in a process of its own, whose peak is that of the solve
            found = subprocess.run(
                [sys.executable, __file__, "--solve", place], stdout=subprocess.PIPE, check=True
            )
            shutil.rmtree(place)
            how = {"case": "store growth", "N": rows, "K": WIDTH, "dtype": dtype, "bytes": size}
            row = how | {"queries": QUERIES} | json.loads(found.stdout)
            if is_recorded:
                record(RESULTS, row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()


def table() -> list[str]:
    """Lines of the page's table."""
    rows = sorted(read_rows(RESULTS), key=lambda row: (row["N"], row["dtype"]))
    columns = ("N", "kept as", "on disk", "seconds", "processor", "peak beyond what was there")
    lines = [
        (
            f"{row['N']:,}",
            row["dtype"],
            f"{row['bytes'] / 1e9:.2f} GB",
            f"{row['seconds']:.0f}",
            f"{row['cpu']:.0f}",
            f"{(row['peak_bytes'] - row['before_bytes']) / 1e6:.0f} MB",
        )
        for row in rows
    ]
    last = rows[-1]
    return [
        *tables.Table(columns, lines, words=("kept as",)).markdown(),
        "",
        f"Top {TOP} of {last['queries']} queries by `{last['method']}`, K = {last['K']:,}, λ = 1x, "
        f"one thread, three passes over the store. {last['device']}, torch {last['torch']}.",
    ]


def draw(file: Path) -> None:
    """Processor seconds and peak memory against the size on disk, both logarithmic."""
    rows = read_rows(RESULTS)
    with mpl.rc_context(plots._STYLE):
        figure = Figure(figsize=(7.5, 2.8), layout="constrained")
        for ax, (title, of) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
            for dtype, colour in (("float32", plots.OURS), ("int8", plots.BASELINE)):
                points = sorted((r["bytes"] / 1e9, of(r)) for r in rows if r["dtype"] == dtype)
                ax.loglog(*zip(*points, strict=True), "-o", color=colour, label=dtype, markersize=4)
            ax.set_title(title, fontsize=9, loc="left")
            ax.set_xlabel("GB on disk")
            ax.set_ylim(1, 1000)
            ax.grid(linewidth=0.3)
            ax.legend(frameon=False)
        how = {"Date": None, "Description": f"rows {plots.fingerprint(rows)}"}
        figure.savefig(file, format="svg", bbox_inches="tight", metadata=how)


@dataclass(frozen=True)
class Page(Table):
    """The table and the curves."""

    def bring_up_to_date(self, *, only_check: bool) -> None:
        """See `Table.bring_up_to_date`."""
        super().bring_up_to_date(only_check=only_check)
        if plots.is_current(PICTURE, read_rows(RESULTS)):
            return
        if only_check:
            sys.exit(f"{PICTURE.relative_to(ROOT)} does not show its rows: run with --docs")
        draw(PICTURE)


TABLE = Page(ROOT / "docs" / "scale.md", "store-growth", table)


def main() -> None:
    """Measure, or rewrite or check the page."""
    if sys.argv[1:2] == ["--solve"]:
        sys.stdout.write(json.dumps(solve(Path(sys.argv[2]))))
        return
    run(TABLE, __doc__, measure_and_record, folder=FOLDER)


if __name__ == "__main__":
    main()
