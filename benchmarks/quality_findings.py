"""Whether errors and verdicts hold, on the digits: repeats of the noise, untrained models, copies.

``python benchmarks/quality_findings.py --record`` appends a row per combination that
benchmarks/results/findings.jsonl lacks, ``--docs`` rewrites the tables of docs/findings.md,
``--check`` only says whether they are up to date. ``--folder`` is a run of `dtrak.attribute` on the
digits, whose model is used; it is made where there is none.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pages import ROOT, Table, read_rows, record, run

import dtrak
from dtrak.data.images import load_data
from dtrak.data.samples import Samples
from dtrak.features.extraction import FusedExtractor, extract_rows
from dtrak.features.settings import FeatureSettings, WhiteningSettings
from dtrak.features.timesteps import select_timesteps
from dtrak.features.whitening import fit_whitening
from dtrak.models.unet import digits_model
from dtrak.pages import tables
from dtrak_kernels import Projection

RESULTS = ROOT / "benchmarks" / "results" / "findings.jsonl"
PAGE = ROOT / "docs" / "findings.md"
FOLDER = Path("runs") / "digits"

METHODS, WHITENINGS, TIMESTEPS, MORE = ("d-trak", "trak"), ("auto", "none"), 10, 100
REPEATS, TRAIN, QUERIES = 6, 200, 24
# of verdicts: training images, images that no model saw, others of these that are queries, and
# queries that are copies of training images
JUDGED, HELD_OUT, UNSEEN, COPIES = 300, 200, 20, 10
# of the half differences' price
BATCH, ROUNDS = 8, 7
CPU = torch.device("cpu")


def spread(data: Samples, count: int) -> Samples:
    """So many of them, evenly spaced."""
    return data.select([place * len(data) // count for place in range(count)])


def covered(values: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Which 95 % intervals of a repeat hold the mean of the others; the shape of ``values``."""
    count = len(values)
    values, errors = values.double(), errors.double()
    others = (values.sum(0) - values) / (count - 1)
    return (values - others).abs() <= 1.959964 * errors * (1 + 1 / (count - 1)) ** 0.5


def noise_row(
    model: Any, method: str, whiten: str, timesteps: int, repeats: int, train: int
) -> dict[str, Any]:
    """Repeats that differ in ``noise_seed`` alone, whitening and damping made anew in each."""
    data = spread(load_data("digits", channels=1, size=8), train)
    queries = load_data("digits", channels=1, size=8, split="validation", limit=QUERIES)
    found = [
        dtrak.explain(
            model,
            data,
            queries,
            method=method,
            whiten=whiten,
            timesteps=timesteps,
            noise_seed=seed,
            noise_halves=True,
            groups="label",
            device="cpu",
            progress=False,
        )
        for seed in range(repeats)
    ]
    findings = [one.findings for one in found]
    scores = torch.stack([one.scores for one in found])
    held = covered(scores, torch.stack([one.errors for one in findings])).double()
    groups = [one.groups for one in findings]
    sums = torch.stack([one.scores for one in groups])
    expected = torch.stack([one.reliabilities for one in findings]).mean(0).double()
    correlations = [torch.corrcoef(scores[:, row].double()) for row in range(scores.shape[1])]
    seen = torch.stack([(c.sum() - repeats) / (repeats * (repeats - 1)) for c in correlations])
    by_query = held.mean((0, 2))
    return {
        "repeats": repeats,
        "train": train,
        "queries": len(queries),
        "covered": float(held.mean()),
        "covered_by_query": [float(by_query.min()), float(by_query.max())],
        "groups_covered": float(
            covered(sums, torch.stack([one.errors for one in groups])).double().mean()
        ),
        "reliability": float(seen.mean()),
        "reliability_by_query": [float(seen.min()), float(seen.max())],
        "expected_reliability": float(expected.mean()),
        "reliabilities_correlate": float(torch.corrcoef(torch.stack([seen, expected]))[0, 1]),
        "clear": float((scores[0].abs() > 1.96 * findings[0].errors).double().mean()),
    }


def verdict_row(model: Any, method: str, whiten: str, timesteps: int) -> dict[str, Any]:
    """What stands out for unseen images, and for copies of training images."""
    whole = load_data("digits", channels=1, size=8)
    rest = load_data("digits", channels=1, size=8, split="all").without(whole)
    data, rest = spread(whole, JUDGED), spread(rest, HELD_OUT + UNSEEN)
    unseen, copies = spread(rest, UNSEEN), spread(data, COPIES)
    pixels = torch.cat([unseen.images, copies.images])
    found = dtrak.explain(
        model,
        data,
        pixels,
        held_out=rest,
        method=method,
        whiten=whiten,
        timesteps=timesteps,
        device="cpu",
        progress=False,
    )
    known = found.findings
    assert known is not None
    assert known.stands_out is not None
    place = {name: column for column, name in enumerate(found.ids)}
    own = [place[name] for name in copies.ids]
    counts = known.stands_out.sum(1)
    return {
        "train": len(data),
        "held_out": known.num_held_out,
        "unseen": UNSEEN,
        "copies": COPIES,
        "unseen_with_any": int((counts[:UNSEEN] > 0).sum()),
        "unseen_counts": counts[:UNSEEN].tolist(),
        "copies_found": int(known.stands_out[range(UNSEEN, UNSEEN + COPIES), own].sum()),
        "others_of_copies": int(counts[UNSEEN:].sum())
        - int(known.stands_out[range(UNSEEN, UNSEEN + COPIES), own].sum()),
    }


def price_row(model: Any, whiten: str) -> dict[str, Any]:
    """Processor time of a batch with half differences over that without, in turns."""
    data = load_data("digits", channels=1, size=8)
    steps = select_timesteps(TIMESTEPS, "uniform", model.process.num_timesteps)
    kind = "lowrank" if whiten == "auto" else whiten
    seconds: dict[bool, list[float]] = {False: [], True: []}
    extractors, whitening = {}, None
    for halves in seconds:
        settings = FeatureSettings(
            "mean_squared_l2_norm",
            tuple(steps),
            0,
            Projection("sjlt", 8192),
            whitening=WhiteningSettings.of(kind),
            halves=halves,
        )
        if settings.whitening is not None and whitening is None:
            whitening = fit_whitening(model, settings, data, CPU)
        extractors[halves] = FusedExtractor(model, settings, CPU, whitening)
    for round_number in range(ROUNDS + 1):
        for halves, extractor in extractors.items():
            begin = time.process_time()
            extract_rows(extractor, data, slice(0, BATCH))
            # the first makes tables
            if round_number:
                seconds[halves].append(time.process_time() - begin)
    plain, both = (statistics.median(times) for times in seconds.values())
    return {"batch": BATCH, "seconds": plain, "seconds_with_halves": both, "ratio": both / plain}


def combinations() -> Iterator[tuple[str, str, str, int]]:
    """Case, method, whitening and S of every row; the first ones first."""
    for whiten in WHITENINGS:
        yield "price", "d-trak", whiten, TIMESTEPS
    for whiten in WHITENINGS:
        for method in METHODS:
            for case in ("noise", "untrained", "trained"):
                yield case, method, whiten, TIMESTEPS
    for method in METHODS:
        for case in ("untrained", "trained", "noise"):
            yield case, method, "auto", MORE


def measure_and_record(is_recorded: bool, smoke: bool, folder: Path) -> None:
    """Append what is missing; without ``--record`` only print it."""
    torch.set_num_threads(1)
    if smoke:
        trained = digits_model()
    else:
        if not (folder / "model" / "model_index.json").is_file():
            command = [sys.executable, "-m", "dtrak.attribute", "--output", str(folder)]
            subprocess.run(command, check=True)
        trained = dtrak.load(folder / "model")
    keys = ("case", "method", "whiten", "timesteps")
    done = {tuple(row[key] for key in keys) for row in read_rows(RESULTS)}
    for combination in combinations():
        case, method, whiten, timesteps = combination
        if timesteps == MORE if smoke else combination in done:
            continue
        begin = time.perf_counter()
        if case == "price":
            found = price_row(trained, whiten)
        elif case == "noise":
            sizes = (2, 20) if smoke else (REPEATS, TRAIN)
            found = noise_row(trained, method, whiten, timesteps, *sizes)
        elif smoke:
            continue
        else:
            model = trained if case == "trained" else digits_model()
            found = verdict_row(model, method, whiten, timesteps)
        row = dict(zip(keys, combination, strict=True)) | found
        if is_recorded:
            record(RESULTS, row)
        sys.stdout.write(f"{row} ({time.perf_counter() - begin:.0f} s)\n")
        sys.stdout.flush()


def _rows(*cases: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(RESULTS) if row["case"] in cases]


def _kind(row: dict[str, Any]) -> str:
    return "whitened, λ 1x" if row["whiten"] == "auto" else "unwhitened, λ auto"


def noise_table() -> list[str]:
    """Lines of the table of errors, and of their price."""
    columns = (
        "method", "features", "S", "covered", "by query", "groups", "reliability", "expected",
        "clear",
    )  # fmt: skip
    rows, lines = _rows("noise"), []
    for row in rows:
        low, high = row["covered_by_query"]
        lines.append(
            (
                row["method"],
                _kind(row),
                row["timesteps"],
                f"{row['covered']:.1%}",
                f"{low:.0%} to {high:.0%}",
                f"{row['groups_covered']:.1%}",
                f"{row['reliability']:.2f}",
                f"{row['expected_reliability']:.2f}",
                f"{row['clear']:.0%}",
            )
        )
    last = rows[-1]
    prices = ", ".join(
        f"{row['ratio']:.2f} times {'whitened' if row['whiten'] == 'auto' else 'unwhitened'}"
        for row in _rows("price")
    )
    return [
        *tables.Table(columns, lines, words=("features",)).markdown(),
        "",
        f"{last['repeats']} repeats that differ in `--noise-seed` alone (whitening and λ made anew "
        f"in each), {last['train']} training digits, {last['queries']} validation "
        "digits. Covered: 95 % intervals of a repeat that hold the mean of the others. "
        "Reliability: mean correlation of two repeats' scores of a query, and what the "
        "errors of one repeat expect it to be. Clear: scores larger than 1.96 errors. Price of "
        f"half differences: {prices} the processor time of a batch without, and features of up to "
        f"64 training images once more. {last['device']}, torch {last['torch']}.",
    ]


def verdict_table() -> list[str]:
    """Lines of the table of verdicts."""
    columns = (
        "model", "method", "features", "S", "unseen digits with anything", "copies found",
        "beside them",
    )  # fmt: skip
    rows = _rows("untrained", "trained")
    lines = [
        (
            row["case"],
            row["method"],
            _kind(row),
            row["timesteps"],
            f"{row['unseen_with_any']} of {row['unseen']}",
            f"{row['copies_found']} of {row['copies']}",
            row["others_of_copies"],
        )
        for row in rows
    ]
    last = rows[-1]
    return [
        *tables.Table(columns, lines, words=("method", "features")).markdown(),
        "",
        f"{last['train']:,} training digits, {last['held_out']} held-out digits, "
        "false discovery rate 5 %. Copies are queries with the pixels of a "
        "training digit and noise of their own; beside them: other images that stand out for these "
        f"queries. {last['device']}, torch {last['torch']}.",
    ]


@dataclass(frozen=True)
class Page(Table):
    """Both tables."""

    def bring_up_to_date(self, *, only_check: bool) -> None:
        """See `Table.bring_up_to_date`."""
        super().bring_up_to_date(only_check=only_check)
        Table(PAGE, "verdicts", verdict_table).bring_up_to_date(only_check=only_check)


TABLE = Page(PAGE, "noise", noise_table)


def main() -> None:
    """Measure, or rewrite or check the page."""
    run(TABLE, __doc__, measure_and_record, folder=FOLDER)


if __name__ == "__main__":
    main()
