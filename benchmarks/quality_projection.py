"""Statistics of the dense projections: errors of inner products against theory.

``python benchmarks/quality_projection.py --record`` measures and appends a row, ``--docs`` rewrites
the table of docs/projection.md from the newest row, ``--check`` only says whether it is up to date.
"""

import json
import sys

import torch
from pages import ROOT, Table, newest, record, run
from torch import Tensor

from dtrak.pages import tables
from dtrak_kernels import Projection, project

RESULTS = ROOT / "benchmarks" / "results" / "projection_statistics.jsonl"

PROJ_DIM, NUM_SMS = 1024, 132
SEEDS = {100: 40, 1000: 40, 50_000: 8, 1_000_000: 2}
MATRICES = {
    "philox rademacher": {"kind": "rademacher"},
    "philox normal": {"kind": "normal"},
    "fast_jl rademacher": {"kind": "rademacher", "generator": "fast_jl", "num_sms": NUM_SMS},
    "fast_jl normal": {"kind": "normal", "generator": "fast_jl", "num_sms": NUM_SMS},
}


def families(grad_dim: int) -> dict[str, Tensor]:
    """Gradients ``[B, P]`` float32 of unit norm; rows of a family are nearly orthogonal.

    * gaussian: what gradients of many independent parameters look like.
    * one-hot: single parameters, a power of two apart, where structured streams repeat.
    * rank one: one gradient, whose norm is all there is to estimate.
    * hot channels: six directions within one hundredth of the parameters.
    * constant: ±1, constant or with a period of 2, 4, 8, 16, 32 or 64 parameters.

    32 rows in all: what is projected at once.
    """
    generator = torch.Generator().manual_seed(grad_dim)
    gaussian = torch.randn(10, grad_dim, generator=generator)
    places = [p for p in (0, 1, 2, 16, 64, 256, 4096, 65536) if p < grad_dim]
    one_hot = torch.zeros(len(places), grad_dim)
    one_hot[range(len(places)), places] = 1
    vector = torch.randn(1, grad_dim, generator=generator)
    width = max(16, grad_dim // 100)
    hot = 0.01 * torch.randn(6, grad_dim, generator=generator)
    hot[:, 3 : 3 + width] += torch.linalg.qr(torch.randn(width, 6, generator=generator))[0].T
    index = torch.arange(grad_dim)
    constant = torch.stack(
        [torch.ones(grad_dim), *(1.0 - 2 * (index >> bit & 1) for bit in range(6))]
    )
    rows = {
        "gaussian": gaussian,
        "one-hot": one_hot,
        "rank one": vector,
        "hot channels": hot,
        "constant": constant,
    }
    return {name: x / x.norm(dim=1, keepdim=True) for name, x in rows.items()}


def standard_errors(grads: Tensor, features: Tensor, kind: str) -> Tensor:
    """Errors of inner products over their theoretical spread, for each pair of rows that has one.

    For independent entries the variance of ``⟨a, b⟩`` estimated with K columns is
    ``(‖a‖²‖b‖² + ⟨a, b⟩² − 2 Σ a²b²) / K`` with signs, and without the last term with normals.

    Args:
        grads: ``[B, P]``.
        features: ``[B, K]``.
        kind: ``"rademacher"`` or ``"normal"``.

    Returns:
        One number per pair ``i <= j``, float64, of mean 0 and variance 1.
    """
    grads, features = grads.double(), features.double()
    exact = grads @ grads.T
    norms = exact.diagonal()
    variance = norms[:, None] * norms + exact**2
    if kind == "rademacher":
        variance -= 2 * grads**2 @ (grads**2).T
    errors = features @ features.T - exact
    upper = torch.triu(torch.ones_like(exact)).bool() & (variance > 1e-6)
    return errors[upper] / (variance[upper] / features.shape[1]).sqrt()


def measure(fields: dict, grad_dim: int, proj_dim: int, seeds: int) -> dict[str, Tensor]:
    """`standard_errors` of each family, ``[seeds, pairs]``."""
    rows = families(grad_dim)
    grads = torch.cat(list(rows.values()))
    found: dict[str, list[Tensor]] = {name: [] for name in rows}
    for seed in range(seeds):
        projection = Projection(proj_dim=proj_dim, seed=seed, **fields)
        features = project(grads, projection).split([len(x) for x in rows.values()])
        for (name, x), part in zip(rows.items(), features, strict=True):
            found[name].append(standard_errors(x, part, projection.kind))
    return {name: torch.stack(parts) for name, parts in found.items()}


def statistics(smoke: bool) -> list[dict]:
    """A case per matrix, P and family."""
    cases = []
    for grad_dim, seeds in SEEDS.items():
        if smoke and grad_dim > 1000:
            continue
        for matrix, fields in MATRICES.items():
            found = measure(fields, grad_dim, PROJ_DIM, 2 if smoke else seeds)
            for family, errors in found.items():
                ratio = errors.square().mean().item() ** 0.5
                cases.append(
                    {
                        "matrix": matrix,
                        "grad_dim": grad_dim,
                        "family": family,
                        "ratio": ratio,
                        "standard_error": ratio * (0.5 / errors.numel()) ** 0.5,
                        "seeds": len(errors),
                    }
                )
    return cases


def table() -> list[str]:
    """Lines of the page's table."""
    row = newest(RESULTS)
    found = {(c["family"], c["grad_dim"], c["matrix"]): c for c in row["cases"]}
    lines = []
    for family, grad_dim in dict.fromkeys((c["family"], c["grad_dim"]) for c in row["cases"]):
        cells = [found[family, grad_dim, matrix] for matrix in MATRICES]
        text = [f"{c['ratio']:.2f} ± {c['standard_error']:.2f}" for c in cells]
        lines.append((family, f"{grad_dim:,}", *text))
    return [
        *tables.Table(("gradients", "P", *MATRICES), lines).markdown(),
        "",
        f"Root mean square error of inner products over its theoretical value, K = "
        f"{row['proj_dim']}, fast_jl for {row['num_sms']} multiprocessors; 1 is right, ± what "
        "uncorrelated errors would scatter by. "
        f"Measured on {row['device']}, torch {row['torch']}, commit {row['commit']}, "
        f"{row['utc'][:10]}.",
    ]


TABLE = Table(ROOT / "docs" / "projection.md", "statistics", table)


def measure_and_record(is_recorded: bool, smoke: bool) -> None:
    """Print a line per case; append the row if it is to be recorded."""
    cases = statistics(smoke)
    for case in cases:
        sys.stdout.write(json.dumps(case) + "\n")
    if is_recorded:
        row = {"case": "projection_statistics", "proj_dim": PROJ_DIM, "num_sms": NUM_SMS}
        record(RESULTS, row | {"cases": cases})


def main() -> None:
    """Measure, or rewrite or check the page."""
    run(TABLE, __doc__, measure_and_record)


if __name__ == "__main__":
    main()
