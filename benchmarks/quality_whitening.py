"""What whitening does to the LDS on the packaged benchmarks, by function, S, kind and width.

``python benchmarks/quality_whitening.py --record`` appends a row per combination that
benchmarks/results/whitening.jsonl lacks, ``--docs`` rewrites the tables of docs/whitening.md,
``--check`` only says whether they are up to date, ``--preset cifar2-16 --data FOLDER`` measures on
natural images. The full model, its queries, the exact gradients (0.8 GB per function and S on the
digits) and the fitted whitenings are kept in ``--folder``, and used again from there.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import plots
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import PRESETS, ROOT, Table, read_rows, record, run
from plots import Rows
from quality_lds import CPU, exact_gradients, packaged_run, random_features
from torch import Tensor

from dtrak.evaluation.lds.experiment import FULL, Experiment
from dtrak.evaluation.lds.statistics import predict_groups
from dtrak.evaluation.lds.table import (
    AUTO,
    UNIT,
    Entry,
    Results,
    dense_ranks,
    make_table,
    packaged_results,
)
from dtrak.evaluation.retraining import TRAIN
from dtrak.features.settings import FeatureSettings, WhiteningSettings
from dtrak.features.timesteps import select_timesteps
from dtrak.features.whitening import fit_whitening
from dtrak.methods.scores import trak
from dtrak.pages import tables
from dtrak_kernels import Projection, Whitening, project
from dtrak_kernels.ridge import RidgeSolver

RESULTS = ROOT / "benchmarks" / "results" / "whitening.jsonl"

FUNCTIONS = {"mean_squared_l2_norm": "D-TRAK", "loss": "TRAK", "mean": "mean"}
# kinds by the color of their lines
COLORS = {
    "none": plots.BASELINE,
    "scale": "#b58900",
    "diagonal": "#c65d21",
    "channels": "#7a9a3a",
    "lowrank": plots.OURS,
    "kfac": "#8a4fa0",
}
KINDS = tuple(COLORS)
# what is measured first comes first: every S, then more widths
STEPS, WIDTHS = (10, 100, 20, 50), (0, 8192)
ENDS, MORE_WIDTHS = (10, 100), (2048, 32768, 65536)
QUERIES = ("validation", "generated")
# of the mean squared feature norm of the training set
MULTIPLES = ("0.0001", "0.001", "0.01", "0.1", "0.3", UNIT, "3", "10")
RESAMPLES = 1000


def fitted(
    experiment: Experiment,
    function: str,
    num_timesteps: int,
    kind: str,
    name: str = FULL,
    rho: float | None = None,
) -> Whitening:
    """The whitening of a model and a kind, kept in the folder once it is fitted; ρ as usual."""
    folder = experiment.folder / "whitenings"
    how = WhiteningSettings(kind)
    how = how if rho is None else replace(how, damping=rho)
    fit = f"{how.factor_images}x{how.factor_timesteps}-{how.scale_images}-rho-{how.damping}"
    member = "" if name == FULL else f"-{name}"
    file = folder / f"{function}-{num_timesteps}-{kind}-{fit}{member}.safetensors"
    if file.is_file():
        return Whitening.load(file, kind=kind, function=function)
    begin = time.perf_counter()
    model, data = (
        experiment.load_model(name),
        experiment.retraining.samples(TRAIN, experiment.data, CPU),
    )
    process = model.process
    steps = select_timesteps(num_timesteps, "uniform", process.num_timesteps, process.spread)
    settings = FeatureSettings(function, tuple(steps), 0, Projection("none"), whitening=how)
    whitening = fit_whitening(model, settings, data, CPU)
    sys.stdout.write(f"fitted {file.stem}: {time.perf_counter() - begin:.1f} s\n")
    folder.mkdir(exist_ok=True)
    whitening.save(file)
    return whitening


def entry(name: str, num_timesteps: int, features: Mapping[str, Tensor], results: Results) -> Entry:
    """What features predict for the models of ``results``, by every λ."""
    queries = torch.cat([features[kind] for kind in QUERIES])
    train, queries = reduced(features[TRAIN], queries)
    solver = RidgeSolver(train)
    unit = float(train.double().square().sum(1).mean())
    dampings = [float(multiple) * unit for multiple in MULTIPLES] + [solver.auto_damping()]
    predictions = [predict_groups(trak(solver, queries, λ), results.subsets) for λ in dampings]
    ranks = dense_ranks(torch.stack(predictions))
    rules = (*MULTIPLES, AUTO)
    return Entry(name, num_timesteps, "", QUERIES, rules, tuple(dampings), ranks)


def reduced(train: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Features with the same scores and fewer columns: in the span of the training features.

    What a query has outside of it meets no training image.

    Args:
        train: ``[N, K]``.
        queries: ``[M, K]``.

    Returns:
        ``[N, N]`` and ``[M, N]`` float64; what was given where K is not above N.
    """
    if train.shape[1] <= train.shape[0]:
        return train, queries
    gram, cross = train.new_zeros(len(train), len(train)).double(), 0
    # sums over columns in double precision, no copy of all of them
    for columns, others in zip(train.split(2**14, dim=1), queries.split(2**14, dim=1), strict=True):
        wide = columns.double()
        gram += wide @ wide.T
        cross = cross + others.double() @ wide.T
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-13 * values[-1]
    roots = values[kept].sqrt()
    return vectors[:, kept] * roots, cross @ vectors[:, kept] / roots


def measure(
    name: str, num_timesteps: int, features: Mapping[str, Tensor], results: Results
) -> list[dict[str, Any]]:
    """A case per kind of query: λ chosen on a half of the models and judged on the other."""
    made = entry(name, num_timesteps, features, results)
    losses = {kind: results.losses[kind] for kind in QUERIES}
    table = make_table(
        Results(results.about, results.subsets, losses, [made]), num_resamples=RESAMPLES
    )
    kept = ("queries", "held_out", "chosen", "in_sample", UNIT, AUTO, "sweep")
    return [{field: row[field] for field in kept} for row in table["rows"]]


def combinations(preset: str) -> Iterator[tuple[str, int, str, str, int]]:
    """Function, S, kind, projection and K of every row, in the order they are measured."""
    wanted = ((STEPS, WIDTHS), (STEPS, MORE_WIDTHS)) if preset == "digits" else ((ENDS, WIDTHS),)
    for steps, widths in wanted:
        for num_timesteps, function, kind, width in product(steps, FUNCTIONS, KINDS, widths):
            yield function, num_timesteps, kind, "sjlt" if width else "none", width


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(row[f] for f in ("function", "timesteps", "kind", "projection", "proj_dim"))


def rows_of(preset: str) -> list[dict[str, Any]]:
    """The rows of a benchmark, the digits if they name none, that were fitted as by default."""
    how = WhiteningSettings("lowrank")
    usual = how.factor_images * how.factor_timesteps, how.scale_images
    return [
        row
        for row in read_rows(RESULTS)
        if row.get("preset", "digits") == preset
        and (row["factor_rows"], row["scale_images"]) == usual
    ]


def measure_and_record(
    is_recorded: bool, smoke: bool, folder: Path, preset: str, source: str | None
) -> None:
    """Append what is missing; without ``--record`` only print it."""
    packaged = packaged_results(preset)
    if packaged is None:
        sys.exit(f"the package must have results of {preset}, but has none")
    results, _ = packaged
    if smoke:
        rehearse(results)
        return
    torch.set_num_threads(1)
    experiment, queries = packaged_run(folder, results, preset, source)
    done = {key_of(row) for row in rows_of(preset)}
    loaded: dict[Any, Any] = {}
    for key in combinations(preset):
        if key in done:
            continue
        function, num_timesteps, kind, projection, width = key
        if loaded.get("gradients") != key[:2]:
            loaded = {"gradients": key[:2]}
            loaded["rows"], loaded["shapes"] = exact_gradients(
                experiment, queries, function, num_timesteps
            )
        if loaded.get("kind") != kind:
            whitening = fitted(experiment, function, num_timesteps, kind)
            loaded |= {"kind": kind, "floored": list(whitening.floored)}
            loaded["features"] = {
                name: torch.cat([whitening.apply(part) for part in rows.split(100)])
                for name, rows in loaded["rows"].items()
            }
        features = loaded["features"]
        if projection != "none":
            sketch = Projection(projection, width, 0)
            features = {
                name: project(rows, sketch, shapes=loaded["shapes"])
                for name, rows in features.items()
            }
        cases = measure(FUNCTIONS[function], num_timesteps, features, results)
        how = WhiteningSettings(kind)
        row = {
            "case": "whitening",
            "preset": preset,
            "function": function,
            "timesteps": num_timesteps,
            "kind": kind,
            "projection": projection,
            "proj_dim": width,
            "models": len(results.subsets),
            "floored": loaded["floored"],
            "factor_rows": how.factor_images * how.factor_timesteps,
            "scale_images": how.scale_images,
            "cases": cases,
        }
        if is_recorded:
            record(RESULTS, row)
        held = " / ".join(f"{100 * case['held_out']['lds']:.1f}" for case in cases)
        unit = " / ".join(f"{100 * case[UNIT]['lds']:.1f}" for case in cases)
        auto = " / ".join(f"{100 * case[AUTO]['lds']:.1f}" for case in cases)
        sys.stdout.write(f"{' '.join(map(str, key))}: {held}, λ 1x {unit}, auto {auto}\n")
        sys.stdout.flush()


def rehearse(results: Results) -> None:
    """Random features of the benchmark's sizes: everything but the model."""
    for case in measure("random", 10, random_features(results, 256), results):
        sys.stdout.write(f"random, {case['queries']}: {case['held_out']}\n")


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of a row in tables and pictures."""
    return (
        list(FUNCTIONS).index(row["function"]),
        row["timesteps"],
        row["projection"] != "none",
        row["proj_dim"],
        KINDS.index(row["kind"]),
    )


def _width(row: Mapping[str, Any]) -> str:
    return "exact" if row["projection"] == "none" else f"{row['proj_dim']:,}"


def _both(cases: list[dict[str, Any]], text: Callable[[dict[str, Any]], str]) -> str:
    by_kind = {case["queries"]: text(case) for case in cases}
    return " / ".join(by_kind[kind] for kind in QUERIES)


def _interval(case: dict[str, Any]) -> str:
    low, high = case["held_out"]["bca"]
    return f"{100 * case['held_out']['lds']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def every_row(preset: str) -> list[str]:
    """Lines of the table of every row of a benchmark, with intervals."""
    rows = sorted(rows_of(preset), key=_order)
    columns, lines = ("function", "S", "K", "kind", "λ held out (95 %)", "λ = 1x", "λ auto"), []
    for row in rows:
        settings = (row["timesteps"], _width(row), f"`{row['kind']}`")
        judged = (_both(row["cases"], _interval), _judged(row, UNIT), _judged(row, AUTO))
        lines.append((FUNCTIONS[row["function"]], *settings, *judged))
    about = _about(rows, ", with intervals by bootstrap (BCa)")
    return [*tables.Table(columns, lines, words=("kind",)).markdown(), "", about]


def table(preset: str = "digits") -> list[str]:
    """Lines of the table of a benchmark: a line per function, S and K, a column per kind."""
    rows = [r for r in sorted(rows_of(preset), key=_order) if r["proj_dim"] in WIDTHS]
    by_kind: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(_order(row)[:4], {})[row["kind"]] = row
    lines = [
        (
            FUNCTIONS[found["none"]["function"]],
            found["none"]["timesteps"],
            _width(found["none"]),
            *(_judged(found[kind], "held_out") for kind in KINDS),
            _judged(found["lowrank"], UNIT),
            _judged(found["none"], AUTO),
        )
        for found in by_kind.values()
        if len(found) == len(KINDS)
    ]
    chosen = ("`lowrank`, λ = 1x", "`none`, λ auto")
    columns = ("function", "S", "K", *(f"`{kind}`" for kind in KINDS), *chosen)
    about = f"λ held out, but for the last two columns. {_about(rows)}"
    return [*tables.Table(columns, lines).markdown(), "", about]


def _judged(row: Mapping[str, Any], rule: str) -> str:
    """``54.5 / 37.0``: the LDS of both kinds of queries by a rule for λ, in %."""
    return _both(row["cases"], lambda case: f"{100 * case[rule]['lds']:.1f}")


def _about(rows: list[dict[str, Any]], intervals: str = "") -> str:
    """What a table shows."""
    last = rows[-1]
    return (
        f"Rank correlation (LDS) on `{last.get('preset', 'digits')}`, in %, validation / generated "
        f"queries: {last['models']} retrained models. λ is chosen on one half of them and judged "
        f"on the other, both ways averaged{intervals}; 1x is the mean squared feature norm of the "
        "training set and auto is chosen from training features, both judged on all models. "
        f"Factors from {last['factor_rows']} rows, scales from "
        f"{last['scale_images']} images. torch {last['torch']}, {len(rows)} rows."
    )


def price_table() -> list[str]:
    """Lines of the table of prices: of every model the newest race."""
    newest: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_rows(PRICES):
        found = newest.setdefault(row["group"], {})
        if found and next(iter(found.values()))["run"] != row["run"]:
            found.clear()
        found[row["provider"]] = row
    lines = []
    last: dict[str, Any] = {}
    for group, rows in newest.items():
        last = list(rows.values())[-1]
        sizes, cpu = last["sizes"], last["cpu"]
        rounds = min(row["rounds"] for row in rows.values())
        name = f"{group}, P = {sizes['P']:,}, B = {sizes['B']}, S = {sizes['S']}, {rounds} rounds"
        ratios = (f"{cpu[kind] / cpu['none']:.2f}x" for kind in KINDS[1:])
        lines.append((name, *ratios))
        walls = (f"{rows[kind]['ratio']:.2f}x" if kind in rows else "" for kind in KINDS[1:])
        lines.append(("the same by the clock", *walls))
        sizes_of = (f"{last['factor_bytes'][kind] / 1e6:.3g} MB" for kind in KINDS[1:])
        lines.append(("factors and scales", *sizes_of))
    columns = ("batch", *(f"`{kind}`" for kind in KINDS[1:]))
    return [
        *tables.Table(columns, lines).markdown(),
        "",
        "Processor time of a batch of `sjlt` features over that of the same batch unwhitened, "
        "medians of rounds that take turns, every result checked against the map of exact "
        "gradients. Figures below 1 say how large the error is. "
        f"{last['device']}, torch {last['torch']}.",
    ]


def draw(file: Path) -> None:
    """LDS with λ held out against S and against K: a line per kind, a column per function."""
    rows = sorted(rows_of("digits"), key=_order)
    width, exact = WIDTHS[-1], 4 * max(MORE_WIDTHS)
    ticks = {k: f"{k // 1024}k" for k in sorted((*MORE_WIDTHS, width))} | {exact: "exact"}
    with mpl.rc_context(plots._STYLE):
        figure = Figure(figsize=(7.5, 9.5), layout="constrained")
        axes = figure.subplots(2 * len(QUERIES), len(FUNCTIONS), sharey="row")
        for column, (function, title) in enumerate(FUNCTIONS.items()):
            found = [row for row in rows if row["function"] == function]
            for place, queries in enumerate(QUERIES):
                by_steps, by_width = axes[place, column], axes[len(QUERIES) + place, column]
                at_width = [row for row in found if row["proj_dim"] == width]
                draw_lines(by_steps, at_width, queries, lambda row: row["timesteps"])
                _axis(by_steps, {s: str(s) for s in sorted(STEPS)}, f"S, at K = {width:,}")
                for steps, style in zip(ENDS, (":", "-"), strict=True):
                    some = [row for row in found if row["timesteps"] == steps]
                    sketched = [row for row in some if row["proj_dim"]]
                    draw_lines(by_width, sketched, queries, lambda row: row["proj_dim"], style)
                    rest = [row for row in some if not row["proj_dim"]]
                    draw_lines(by_width, rest, queries, lambda row: exact)
                _axis(by_width, ticks, "K; S = 100, dotted: S = 10")
                if column == 0:
                    by_steps.set_ylabel(f"LDS in %, {queries}")
                    by_width.set_ylabel(f"LDS in %, {queries}")
            axes[0, column].set_title(title, fontsize=9)
        shown, kinds = axes[0, 0].get_legend_handles_labels()
        figure.legend(shown, kinds, loc="outside lower center", ncols=len(KINDS), frameon=False)
        figure.savefig(
            file,
            format=file.suffix[1:],
            bbox_inches="tight",
            metadata={"Description": f"rows {plots.fingerprint(rows)}"}
            | ({"Date": None} if file.suffix == ".svg" else {}),
        )


def draw_lines(
    ax: Axes, rows: Rows, queries: str, along: Callable[[Any], float], style: str = "-"
) -> None:
    """A line per kind of λ held out, with its intervals, moved apart a little."""
    for number, (kind, color) in enumerate(COLORS.items()):
        shown = sorted((row for row in rows if row["kind"] == kind), key=along)
        held = [next(c["held_out"] for c in r["cases"] if c["queries"] == queries) for r in shown]
        places = [along(row) * 1.04 ** (number - len(COLORS) / 2 + 0.5) for row in shown]
        values = [100 * found["lds"] for found in held]
        below = [100 * (found["lds"] - found["bca"][0]) for found in held]
        above = [100 * (found["bca"][1] - found["lds"]) for found in held]
        ax.errorbar(
            places, values, (below, above), label=kind, color=color, linestyle=style,
            linewidth=1.2, elinewidth=0.6, marker="o", markersize=2.5,
        )  # fmt: skip


def _axis(ax: Axes, ticks: Mapping[int, str], name: str) -> None:
    ax.set_xscale("log")
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.minorticks_off()
    ax.set_xlabel(name, fontsize=8)
    ax.grid(axis="y", linewidth=0.3)


PAGE = ROOT / "docs" / "whitening.md"
ROWS_PAGE = ROOT / "docs" / "whitening_rows.md"
PRICES = ROOT / "benchmarks" / "results" / "whitening_price.jsonl"


@dataclass(frozen=True)
class Page(Table):
    """Tables, prices, the page of every row, and the picture."""

    def bring_up_to_date(self, *, only_check: bool) -> None:
        """See `Table.bring_up_to_date`."""
        super().bring_up_to_date(only_check=only_check)
        for page, marker, make in (
            (PAGE, "whitening-natural", lambda: table("cifar2-16")),
            (PAGE, "whitening-price", price_table),
            (ROWS_PAGE, "digits", lambda: every_row("digits")),
            (ROWS_PAGE, "cifar2-16", lambda: every_row("cifar2-16")),
        ):
            Table(page, marker, make).bring_up_to_date(only_check=only_check)
        if not only_check:
            draw(PAGE.with_suffix(".svg"))


TABLE = Page(PAGE, "whitening", table)


def main() -> None:
    """Measure, or rewrite or check the page."""
    run(TABLE, __doc__, measure_and_record, presets=PRESETS)


if __name__ == "__main__":
    main()
