"""What keeping features in fewer bytes does to scores: LDS and λ on the digits benchmark.

``python benchmarks/quality_stores.py --record`` appends a row per combination that
benchmarks/results/stores.jsonl lacks, ``--docs`` rewrites the table of docs/scale.md, ``--check``
only says whether it is up to date. The digits' full model, its queries and their features are kept
in ``--folder``, and used again from there.
"""

import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pages import ROOT, Table, read_rows, record, run
from quality_lds import features_of, packaged_run, random_features
from quality_whitening import fitted, measure
from torch import Tensor

from dtrak.evaluation.lds.table import AUTO, UNIT, packaged_results
from dtrak.evaluation.retraining import TRAIN
from dtrak.features.packing import pack, packed_bytes, unpack
from dtrak.pages import tables
from dtrak.runs.choices import STORE_DTYPES
from dtrak_kernels import Projection
from dtrak_kernels.ridge import RidgeSolver

RESULTS = ROOT / "benchmarks" / "results" / "stores.jsonl"
FOLDER = Path("runs") / "digits-stores"
FUNCTIONS = {"mean_squared_l2_norm": "D-TRAK", "loss": "TRAK"}
KINDS = ("lowrank", "none")
TIMESTEPS, WIDTH = 10, 8192


def case_of(
    features: Mapping[str, Tensor], dtype: str, function: str, results: Any
) -> dict[str, Any]:
    """A row: features of training images rounded as a store would, those of queries as they are."""
    train = unpack(pack(features[TRAIN], dtype))
    exact = features[TRAIN].double()
    unit = float(train.double().square().sum(1).mean())
    return {
        "dtype": dtype,
        "bytes": packed_bytes(train.shape[1], dtype),
        "error": float((train - exact).norm() / exact.norm()),
        "unit": unit,
        "auto": RidgeSolver(train).auto_damping() / unit,
        "cases": measure(FUNCTIONS[function], TIMESTEPS, {**features, TRAIN: train}, results),
    }


def measure_and_record(is_recorded: bool, smoke: bool, folder: Path) -> None:
    """Append what is missing; without ``--record`` only print it."""
    packaged = packaged_results("digits")
    assert packaged is not None
    results, _ = packaged
    if smoke:
        features = random_features(results, 256)
        sys.stdout.write(f"{case_of(features, 'int8', 'loss', results)}\n")
        return
    torch.set_num_threads(1)
    experiment, queries = packaged_run(folder, results)
    done = {(row["function"], row["kind"], row["dtype"]) for row in read_rows(RESULTS)}
    for function, kind in product(FUNCTIONS, KINDS):
        left = [dtype for dtype in STORE_DTYPES if (function, kind, dtype) not in done]
        if not left:
            continue
        whitening = None if kind == "none" else fitted(experiment, function, TIMESTEPS, kind)
        place, projection = f"features/{function}-{kind}", Projection("sjlt", WIDTH)
        features, _ = features_of(
            experiment, queries, function, TIMESTEPS, projection, place, whitening=whitening
        )
        for dtype in left:
            how = {
                "case": "stores",
                "function": function,
                "timesteps": TIMESTEPS,
                "kind": kind,
                "proj_dim": WIDTH,
                "models": len(results.subsets),
            }
            row = how | case_of(features, dtype, function, results)
            if is_recorded:
                record(RESULTS, row)
            sys.stdout.write(f"{function} {kind} {dtype}: {_lds(row, 'held_out')}\n")
            sys.stdout.flush()


def _lds(row: Mapping[str, Any], rule: str) -> str:
    """LDS in %, validation / generated."""
    by_kind = {case["queries"]: case[rule]["lds"] for case in row["cases"]}
    return " / ".join(f"{100 * by_kind[kind]:.2f}" for kind in ("validation", "generated"))


def table() -> list[str]:
    """Lines of the page's table."""
    rows = read_rows(RESULTS)
    order = lambda row: (
        list(FUNCTIONS).index(row["function"]),
        KINDS.index(row["kind"]),
        STORE_DTYPES.index(row["dtype"]),
    )
    columns = (
        "function", "whitening", "kept as", "bytes a row", "error", "LDS, λ held out", "λ = 1x",
        "λ auto", "λ auto is",
    )  # fmt: skip
    lines = [
        (
            FUNCTIONS[row["function"]],
            f"`{row['kind']}`",
            row["dtype"],
            f"{row['bytes']:,}",
            f"{row['error']:.1e}",
            *(_lds(row, rule) for rule in ("held_out", UNIT, AUTO)),
            f"{row['auto']:.3g}x",
        )
        for row in sorted(rows, key=order)
    ]
    last = rows[-1]
    return [
        *tables.Table(columns, lines, words=("whitening", "kept as")).markdown(),
        "",
        "Digits, LDS in %, validation / generated queries, "
        f"{last['models']} retrained models, S = {last['timesteps']}, `sjlt` with "
        f"K = {last['proj_dim']:,}; the error is that of all features together, λ as in "
        f"docs/whitening.md. torch {last['torch']}.",
    ]


TABLE = Table(ROOT / "docs" / "scale.md", "stores", table)


def main() -> None:
    """Measure, or rewrite or check the page."""
    run(TABLE, __doc__, measure_and_record, folder=FOLDER)


if __name__ == "__main__":
    main()
