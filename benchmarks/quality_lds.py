"""What the random matrix of ``sjlt`` does to the LDS: many draws of it against exact gradients.

``python benchmarks/quality_lds.py --record`` measures and appends a row, ``--docs`` rewrites the
second table of docs/sketches.md from the newest row, ``--check`` only says whether it is up to
date. The digits' full model, the queries it draws and the exact gradients (1.7 GB) are kept in
``--folder``, and used again from there.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pages import ROOT, Table, newest, record, run
from rich.console import Console
from torch import Tensor

from dtrak.data.samples import Samples
from dtrak.evaluation.lds.experiment import FULL, Experiment, prepare, train_one
from dtrak.evaluation.lds.queries import query_sets
from dtrak.evaluation.lds.statistics import lds
from dtrak.evaluation.lds.table import AUTO, Results, packaged_results
from dtrak.evaluation.retraining import TRAIN
from dtrak.features.extraction import FusedExtractor, complete_store
from dtrak.features.settings import FeatureSettings, WhiteningSettings
from dtrak.features.timesteps import select_timesteps
from dtrak.methods.scores import trak
from dtrak.pages import tables
from dtrak.runs.console import progress_bar
from dtrak.runs.workers import one_thread
from dtrak.training.presets import Preset, get_preset
from dtrak_kernels import Projection, Whitening, project
from dtrak_kernels.ridge import RidgeSolver

RESULTS = ROOT / "benchmarks" / "results" / "lds_draws.jsonl"
FOLDER = Path("runs") / "lds-draws"

# seed 0 is the draw in the package
PROJ_DIM, TIMESTEPS, DRAWS = 8192, 100, 24
METHODS = {"D-TRAK": "mean_squared_l2_norm", "TRAK": "loss"}
KINDS = ("generated", "validation")
CPU = torch.device("cpu")
# a difference of LDS that is small enough
_POINT = 0.01


def trained_run(
    folder: Path,
    preset: Preset,
    num_queries: Mapping[str, int],
    source: str | None = None,
    **numbers: int,
) -> tuple[Experiment, dict[str, Samples]]:
    """The run in ``folder`` with its full model and queries, as ``python -m dtrak.lds`` makes it.

    No subset model is trained: their losses come with the package.

    Args:
        folder: of the run.
        preset: of the experiment.
        num_queries: by their kind.
        source: where the data set lies, as `prepare` takes it.
        numbers: others, as `prepare` takes them.
    """
    counts = {f"num_{kind}": count for kind, count in num_queries.items()}
    experiment, console = prepare(folder, preset, source, **counts, **numbers), Console(stderr=True)
    with progress_bar(console, "train") as progress, one_thread():
        train_one(experiment, FULL, CPU, progress)
    with progress_bar(console, "draw the queries") as progress:
        return experiment, dict(query_sets(experiment, CPU, progress))


def exact_gradients(
    experiment: Experiment,
    queries: Mapping[str, Samples],
    function: str,
    num_timesteps: int,
    name: str = FULL,
) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    """A model's gradients of an output function, as the methods of `dtrak.lds` take them.

    Returns:
        ``[N, P]`` float32 of the training images and ``[M, P]`` of every kind of query, and the
        shapes of the parameters.
    """
    member = "" if name == FULL else f"-{name}"
    place = f"gradients/{function}-{num_timesteps}{member}"
    projection = Projection("none", 0)
    return features_of(experiment, queries, function, num_timesteps, projection, place, name=name)


def features_of(
    experiment: Experiment,
    queries: Mapping[str, Samples],
    function: str,
    num_timesteps: int,
    projection: Projection,
    place: str,
    *,
    name: str = FULL,
    whitening: Whitening | None = None,
) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    """A model's features, kept in ``place`` of the run.

    Returns:
        ``[N, K]`` float32 of the training images and ``[M, K]`` of every kind of query, and the
        shapes of the parameters.
    """
    model = experiment.load_model(name)
    process = model.process
    timesteps = select_timesteps(num_timesteps, "uniform", process.num_timesteps, process.spread)
    way = None if whitening is None else WhiteningSettings.of(whitening.kind)
    settings = FeatureSettings(function, tuple(timesteps), 0, projection, whitening=way)
    extractor = FusedExtractor(model, settings, CPU, whitening)
    parts = {TRAIN: experiment.retraining.samples(TRAIN, experiment.data, CPU), **queries}
    found = {}
    for part, data in parts.items():
        role = "train" if part == TRAIN else "query"
        bar = partial(progress_bar, Console(stderr=True), f"{place} {part}")
        folder = experiment.folder / place / part
        found[part] = complete_store(folder, extractor, data, role, bar).load()
    return found, extractor.sketcher.shapes


def packaged_run(
    folder: Path,
    results: Results,
    preset: str = "digits",
    source: str | None = None,
    **numbers: int,
) -> tuple[Experiment, dict[str, Samples]]:
    """`trained_run` of packaged results; ends with a message where ``folder`` is another."""
    counts = results.about["queries"]
    experiment, queries = trained_run(folder, get_preset(preset), counts, source, **numbers)
    if not torch.equal(experiment.subsets[: len(results.subsets)], results.subsets):
        sys.exit(f"subsets of {folder} must be those of the packaged results, got others")
    return experiment, queries


def random_features(results: Results, width: int) -> dict[str, Tensor]:
    """For a rehearsal: ``[rows, width]`` of the training images and of every kind of query."""
    generator = torch.Generator().manual_seed(0)
    sizes = {TRAIN: results.subsets.shape[1]}
    sizes |= {kind: losses.shape[1] for kind, losses in results.losses.items()}
    return {name: torch.randn(size, width, generator=generator) for name, size in sizes.items()}


def auto_lds(features: Mapping[str, Tensor], results: Results) -> dict[str, float]:
    """LDS by kind of query on all models, λ chosen from these training features alone."""
    solver = RidgeSolver(features[TRAIN])
    damping = solver.auto_damping()
    return {
        kind: lds(trak(solver, features[kind], damping), results.subsets, losses)
        for kind, losses in results.losses.items()
    }


def measure(
    gradients: Mapping[str, Tensor],
    shapes: Sequence[Sequence[int]],
    results: Results,
    *,
    proj_dim: int,
    draws: int,
) -> dict[str, dict[str, Any]]:
    """By kind of query: the exact gradients' LDS, and that of ``draws`` sketches of them."""
    exact = auto_lds(gradients, results)
    found: dict[str, dict[str, Any]] = {
        kind: {"exact": value, "sjlt": []} for kind, value in exact.items()
    }
    with progress_bar(Console(stderr=True), "draws") as progress:
        for seed in range(draws):
            projection = Projection("sjlt", proj_dim, seed)
            features = {
                name: project(rows, projection, shapes=shapes) for name, rows in gradients.items()
            }
            for kind, value in auto_lds(features, results).items():
                found[kind]["sjlt"].append(value)
            progress(seed + 1, draws)
    return found


def summary(exact: float, sketched: Sequence[float]) -> dict[str, float]:
    """Differences to the exact LDS over draws of the matrix, and how sure their mean is."""
    differences = torch.tensor(sketched, dtype=torch.float64) - exact
    deviation = float(differences.std())
    return {
        "mean": float(differences.mean()),
        "standard_error": deviation / len(sketched) ** 0.5,
        "deviation": deviation,
        "largest": float(differences.abs().max()),
        "within": int((differences.abs() <= _POINT).sum()),
    }


def packaged_lds(table: Mapping[str, Any], method: str, kind: str, projection: str) -> float:
    """The column ``λ auto`` of the packaged table, of which a draw of ``sjlt`` is seed 0's."""
    wanted = {
        "method": method,
        "queries": kind,
        "projection": projection,
        "timesteps": TIMESTEPS,
    }
    (row,) = (r for r in table["rows"] if wanted.items() <= r.items())
    return float(row[AUTO]["lds"])


def table() -> list[str]:
    """Lines of the page's table."""
    row = newest(RESULTS)
    lines = []
    is_same, farthest = True, 0.0
    for case in row["cases"]:
        found = summary(case["exact"], case["sjlt"])
        lines.append(
            (
                case["method"],
                case["queries"],
                f"{100 * case['exact']:.1f}",
                f"{100 * found['mean']:+.2f} ± {100 * found['standard_error']:.2f}",
                f"{100 * found['deviation']:.2f}",
                f"{100 * found['largest']:.2f}",
                f"{found['within']} of {len(case['sjlt'])}",
            )
        )
        for here, there in (
            (case["exact"], case["packaged_exact"]),
            (case["sjlt"][0], case["packaged_sjlt"]),
        ):
            is_same &= f"{100 * here:.1f}" == f"{100 * there:.1f}"
            farthest = max(farthest, abs(here - there))
    same = "to the printed digit" if is_same else f"to within {100 * farthest:.2f} points"
    columns = (
        "method",
        "queries",
        "LDS, exact",
        "`sjlt` - exact, mean",
        "deviation of a draw",
        "largest",
        "within 1 point",
    )
    return [
        *tables.Table(columns, lines, words=("queries",)).markdown(),
        "",
        f"LDS in %, differences in points of it: {row['models']} retrained models, S = "
        f"{row['timesteps']}, P = {row['grad_dim']:,}, K = {row['proj_dim']:,}, λ auto for each "
        f"draw anew; mean ± one standard error over {row['draws']} draws. The exact LDS and that "
        f"of seed 0 are those of [the digits' table](lds_digits.md) {same}. Measured on "
        f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['utc'][:10]}.",
    ]


TABLE = Table(ROOT / "docs" / "sketches.md", "lds-draws", table)


def rehearse(results: Results) -> None:
    """Two draws of random gradients: everything but the model."""
    gradients = random_features(results, 4160)
    found = measure(gradients, [(64, 64), (64,)], results, proj_dim=512, draws=2)
    for kind in KINDS:
        sys.stdout.write(f"random, {kind}: {summary(**_both(found[kind]))}\n")


def _both(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"exact": found["exact"], "sketched": found["sjlt"]}


def measure_and_record(is_recorded: bool, smoke: bool, folder: Path) -> None:
    """Print a line per method and kind of query; append the row if it is to be recorded."""
    packaged = packaged_results("digits")
    assert packaged is not None
    results, published = packaged
    if smoke:
        rehearse(results)
        return
    experiment, queries = packaged_run(folder, results)
    cases, grad_dim = [], 0
    for method, function in METHODS.items():
        gradients, shapes = exact_gradients(experiment, queries, function, TIMESTEPS)
        grad_dim = gradients[TRAIN].shape[1]
        found = measure(gradients, shapes, results, proj_dim=PROJ_DIM, draws=DRAWS)
        for kind in KINDS:
            case = {
                "method": method,
                "queries": kind,
                **found[kind],
                "packaged_exact": packaged_lds(published, method, kind, "none"),
                "packaged_sjlt": packaged_lds(published, method, kind, "sjlt"),
            }
            cases.append(case)
            sys.stdout.write(
                f"{method}, {kind}: exact {case['exact']:.6f} (packaged "
                f"{case['packaged_exact']:.6f}), seed 0 {case['sjlt'][0]:.6f} (packaged "
                f"{case['packaged_sjlt']:.6f}), {summary(**_both(case))}\n"
            )
            sys.stdout.flush()
    if is_recorded:
        row = {
            "case": "lds_draws",
            "models": len(results.subsets),
            "timesteps": TIMESTEPS,
            "proj_dim": PROJ_DIM,
            "draws": DRAWS,
            "grad_dim": grad_dim,
            "cases": cases,
        }
        record(RESULTS, row)


def main() -> None:
    """Measure, or rewrite or check the page."""
    run(TABLE, __doc__, measure_and_record, folder=FOLDER)


if __name__ == "__main__":
    main()
