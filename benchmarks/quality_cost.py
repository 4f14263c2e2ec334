"""Accuracy against cost: LDS by the processor seconds an image takes, on both benchmarks.

``python benchmarks/quality_cost.py --preset digits --record`` times features here and appends a row
to benchmarks/results/accuracy_cost.jsonl; ``--docs`` draws docs/accuracy.svg from the newest row of
each benchmark, the rows of benchmarks/results/whitening.jsonl and the results in the package;
``--check`` only says whether it is up to date.
"""

import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import plots
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pages import PRESETS, ROOT, Table, read_rows, record, run
from quality_lds import CPU, packaged_run
from quality_whitening import FUNCTIONS, QUERIES, fitted, rows_of

from dtrak.evaluation.lds.options import WHITENED
from dtrak.evaluation.lds.table import packaged_results
from dtrak.evaluation.retraining import TRAIN
from dtrak.features.extraction import FusedExtractor, extract_rows, fitting_batch_size
from dtrak.features.settings import FeatureSettings, WhiteningSettings
from dtrak.features.timesteps import select_timesteps
from dtrak_kernels import Projection

RESULTS = ROOT / "benchmarks" / "results" / "accuracy_cost.jsonl"
PICTURE = ROOT / "docs" / "accuracy.svg"
PROJ_DIM, ROUNDS = 8192, 3
STEPS, KINDS = (10, 20, 100), ("none", "lowrank")
_COLOURS = dict(zip(FUNCTIONS.values(), (plots.OURS, "#b3541e", "#2a7d4f"), strict=True))
_TITLES = {"digits": "digits, 8 x 8, 64 models", "cifar2-16": "CIFAR-2, 16 x 16, 48 models"}


class Point(NamedTuple):
    """A method at one S: what it costs and what it reaches, in %."""

    method: str
    is_whitened: bool
    timesteps: int
    seconds: float
    lds: float
    interval: tuple[float, float]


def measure_and_record(
    is_recorded: bool, smoke: bool, folder: Path, preset: str, source: str | None
) -> None:
    """Processor time of the features of an image, by function, S and kind, in rounds."""
    packaged = packaged_results("digits" if smoke else preset)
    if packaged is None:
        sys.exit(f"the package must have results of {preset}, but has none")
    if smoke:
        for chosen in PRESETS:
            sys.stdout.write(f"{chosen}: {len(list(points(chosen, 'validation')))} points\n")
        return
    torch.set_num_threads(1)
    experiment, _ = packaged_run(folder, packaged[0], preset, source)
    data = experiment.retraining.samples(TRAIN, experiment.data, CPU)
    settings = list(product(FUNCTIONS, STEPS, KINDS))
    taken: dict[Any, list[float]] = {key: [] for key in settings}
    for number in range(ROUNDS):
        for key in random.Random(number).sample(settings, len(settings)):
            function, count, kind = key
            model = experiment.load_model()
            process = model.process
            steps = select_timesteps(count, "uniform", process.num_timesteps, process.spread)
            how = WhiteningSettings.of(kind)
            whitening = None if how is None else fitted(experiment, function, count, kind)
            extractor = FusedExtractor(
                model,
                FeatureSettings(
                    function, tuple(steps), 0, Projection("sjlt", PROJ_DIM, 0), whitening=how
                ),
                CPU,
                whitening,
            )
            rows = slice(0, fitting_batch_size(extractor, data))
            # tables are made and memory is found by the first batch
            extract_rows(extractor, data, rows)
            begin = time.process_time()
            extract_rows(extractor, data, rows)
            taken[key].append((time.process_time() - begin) / rows.stop)
    cases = [
        {
            "function": function,
            "timesteps": count,
            "kind": kind,
            "seconds": statistics.median(values),
            "least": min(values),
            "most": max(values),
        }
        for (function, count, kind), values in taken.items()
    ]
    for case in cases:
        sys.stdout.write(f"{case}\n")
    if is_recorded:
        record(
            RESULTS,
            {
                "case": "accuracy_cost",
                "preset": preset,
                "proj_dim": PROJ_DIM,
                "threads": 1,
                "rounds": ROUNDS,
                "cases": cases,
            },
        )


def newest_row(preset: str) -> dict[str, Any] | None:
    """The last row of a benchmark, if there is one."""
    return next((r for r in reversed(read_rows(RESULTS)) if r["preset"] == preset), None)


def points(preset: str, queries: str) -> Iterator[Point]:
    """Every method at every S that was both judged and timed."""
    row = newest_row(preset)
    if row is None:
        return
    judged = packaged_points(preset, queries)
    for found in rows_of(preset):
        if found["proj_dim"] == row["proj_dim"]:
            key = found["function"], found["timesteps"], found["kind"]
            case = next(c for c in found["cases"] if c["queries"] == queries)
            judged.setdefault(key, case["held_out"])
    for case in row["cases"]:
        key = case["function"], case["timesteps"], case["kind"]
        if key in judged:
            low, high = judged[key]["bca"]
            yield Point(
                FUNCTIONS[case["function"]],
                case["kind"] != "none",
                case["timesteps"],
                case["seconds"],
                100 * judged[key]["lds"],
                (100 * low, 100 * high),
            )


def packaged_points(preset: str, queries: str) -> dict[Any, Mapping[str, Any]]:
    """LDS in the package by function, S and kind of whitening, of sketches of K = 8,192."""
    packaged = packaged_results(preset)
    assert packaged is not None
    names = {"D-TRAK": "mean_squared_l2_norm", "TRAK": "loss", "D-TRAK, mean": "mean"}
    names |= {f"{name}, {WHITENED}": function for name, function in list(names.items())}
    return {
        (
            names[row["method"]],
            row["timesteps"],
            "lowrank" if WHITENED in row["method"] else "none",
        ): (row["held_out"])
        for row in packaged[1]["rows"]
        if row["method"] in names and row["queries"] == queries and row["projection"] == "sjlt"
    }


def raw_pixels(preset: str, queries: str) -> tuple[float, tuple[float, float]]:
    """LDS of the better similarity of pixels, and its interval, in %."""
    packaged = packaged_results(preset)
    assert packaged is not None
    rows = [
        row["held_out"]
        for row in packaged[1]["rows"]
        if row["method"].startswith("Raw pixels") and row["queries"] == queries
    ]
    best = max(rows, key=lambda row: float(row["lds"]))
    low, high = best["bca"]
    return 100 * best["lds"], (100 * low, 100 * high)


def draw(file: Path) -> None:
    """A row of panels per benchmark, one for each kind of query."""
    presets = [preset for preset in PRESETS if newest_row(preset) is not None]
    with mpl.rc_context(plots._STYLE):
        figure = Figure(figsize=(8.2, 0.6 + 2.7 * len(presets)), layout="constrained")
        axes = figure.subplots(len(presets), 2, squeeze=False, sharey="row", sharex="row")
        for line, preset in zip(axes, presets, strict=True):
            for ax, queries in zip(line, QUERIES, strict=True):
                _draw_panel(ax, preset, queries)
            line[0].set_ylabel("LDS in %, λ held out")
        for ax in axes[-1]:
            ax.set_xlabel("processor seconds per image, one thread")
        figure.legend(
            handles=[
                *(Line2D([], [], color=c, marker="o", label=n) for n, c in _COLOURS.items()),
                Line2D([], [], color="#555555", marker="o", label="whitened"),
                Line2D(
                    [], [], color="#555555", marker="o", markerfacecolor="white",
                    linestyle="--", label="as published",
                ),
                Line2D([], [], color=plots.THEIRS, linestyle=":", label="raw pixels"),
            ],
            loc="outside upper center", ncols=6, frameon=False,
        )  # fmt: skip
        figure.savefig(
            file,
            format="svg",
            bbox_inches="tight",
            metadata={"Date": None, "Description": f"rows {plots.fingerprint(shown_rows())}"},
        )


def _draw_panel(ax: Any, preset: str, queries: str) -> None:
    found = list(points(preset, queries))
    level, (low, high) = raw_pixels(preset, queries)
    ax.axhspan(low, high, color=plots.THEIRS, alpha=0.15, linewidth=0)
    ax.axhline(level, color=plots.THEIRS, linestyle=":")
    for method, is_whitened in product(_COLOURS, (False, True)):
        curve = sorted(
            (p for p in found if p.method == method and p.is_whitened == is_whitened),
            key=lambda point: point.timesteps,
        )
        if not curve:
            continue
        colour, x, y = (
            _COLOURS[method],
            [point.seconds for point in curve],
            [point.lds for point in curve],
        )
        ax.vlines(
            x, *zip(*(point.interval for point in curve), strict=True), color=colour, alpha=0.5
        )
        ax.plot(
            x, y, "-o" if is_whitened else "--o", color=colour, markersize=5, linewidth=1.4,
            markerfacecolor=colour if is_whitened else "white",
        )  # fmt: skip
    # S once, at the uppermost point of each
    for count in sorted({point.timesteps for point in found}):
        top = max((p for p in found if p.timesteps == count), key=lambda point: point.lds)
        ax.annotate(
            f"S = {count}", (top.seconds, top.interval[1]), (0, 3), textcoords="offset points",
            ha="center", fontsize=8, bbox={"color": "white", "pad": 0.5},
        )  # fmt: skip
    ax.set_xscale("log")
    plots._readable(ax.xaxis, lambda value: f"{value:g}")
    ax.set_title(f"{_TITLES[preset]}, {queries} queries", fontsize=9, loc="left")
    ax.set_ylim(bottom=min(0, *(p.interval[0] for p in found)) if found else 0)
    ax.grid(axis="y", linewidth=0.3)


def shown_rows() -> list[Mapping[str, Any]]:
    """What the picture is drawn from."""
    rows: list[Mapping[str, Any]] = []
    for preset in PRESETS:
        newest = newest_row(preset)
        if newest is not None:
            rows.append(newest)
            for queries in QUERIES:
                rows += [point._asdict() for point in points(preset, queries)]
                rows.append({"raw pixels": raw_pixels(preset, queries)})
    return rows


@dataclass(frozen=True)
class Picture(Table):
    """The picture instead of a table."""

    def bring_up_to_date(self, *, only_check: bool) -> None:
        """See `Table.bring_up_to_date`."""
        if plots.is_current(self.page, shown_rows()):
            return
        if only_check:
            sys.exit(f"{self.page.relative_to(ROOT)} does not show its rows: run with --docs")
        draw(self.page)


TABLE = Picture(PICTURE, "", list)


def main() -> None:
    """Measure, or draw or check the picture."""
    run(TABLE, __doc__, measure_and_record, presets=PRESETS)


if __name__ == "__main__":
    main()
