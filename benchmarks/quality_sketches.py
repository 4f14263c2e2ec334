"""Errors of the sketches on real gradients: those of the trained digits model.

``python benchmarks/quality_sketches.py --record`` measures and appends a row, ``--docs`` rewrites
the table of docs/sketches.md from the newest row, ``--check`` only says whether it is up to date.
"""

import json
import sys

import torch
from pages import ROOT, Table, newest, record, run
from torch import Tensor

from dtrak.data.images import load_data
from dtrak.features.noise import sample_noise
from dtrak.features.outputs import evaluate_output
from dtrak.features.timesteps import select_timesteps
from dtrak.models.unet import digits_model
from dtrak.pages import tables
from dtrak.training.trainer import Recipe, train
from dtrak_kernels import GradientSketcher, Projection, project

RESULTS = ROOT / "benchmarks" / "results" / "sketch_statistics.jsonl"

PROJ_DIM, SAMPLES, TIMESTEPS, DRAWS = 8192, 12, 10, 60
SKETCHES = {
    "`sjlt`": {"kind": "sjlt"},
    **{f"`kronecker`, r = {r}": {"kind": "kronecker", "factor_dim": r} for r in (4, 8, 16, 32)},
}


def trained_gradients(steps: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """D-TRAK gradients ``[12, P]`` float64 of norm 1, and the shapes of the parameters."""
    torch.set_num_threads(1)
    data = load_data("digits").select(range(SAMPLES))
    model = digits_model()
    train(model, load_data("digits").images, Recipe(steps=steps))
    timesteps = select_timesteps(TIMESTEPS, "uniform")
    noise = sample_noise(data.ids, timesteps, data.images.shape[1:], seed=0).flatten(0, 1)
    t = torch.tensor(timesteps).repeat(SAMPLES)
    images = data.images.repeat_interleave(TIMESTEPS, 0)
    noisy = model.process.scheduler.add_noise(images, noise, t)
    sketcher = GradientSketcher(model.module, Projection("none", 0), rows_per_sample=TIMESTEPS)
    grads = sketcher.sketch(
        lambda: evaluate_output(
            "mean_squared_l2_norm", model.module(noisy, t).sample, noise, model.process.weight(t)
        ),
        SAMPLES,
    ).double()
    return grads / grads.norm(dim=1, keepdim=True), sketcher.shapes


def measure(grads: Tensor, shapes: list[tuple[int, ...]], fields: dict, draws: int) -> dict:
    """Bias and variance of all inner products over ``draws`` sketches."""
    gram = grads @ grads.T
    errors = []
    for seed in range(draws):
        features = project(grads, Projection(proj_dim=PROJ_DIM, seed=seed, **fields), shapes=shapes)
        errors.append(features @ features.T - gram)
    errors = torch.stack(errors)
    bound = ((1 + gram.square()) / PROJ_DIM).mean()
    per_draw = errors.square().mean((1, 2))
    return {
        "rms_error": per_draw.mean().sqrt().item(),
        "ratio": (per_draw.mean() / bound).item(),
        "standard_error": (per_draw.std() / draws**0.5 / bound).item(),
        "bias": errors.mean().item(),
        "bias_error": (errors.mean((1, 2)).std() / draws**0.5).item(),
    }


def table() -> list[str]:
    """Lines of the page's table."""
    row = newest(RESULTS)
    cells = [
        (
            name,
            f"{case['rms_error']:.4f}",
            f"{case['ratio']:.2f} ± {case['standard_error']:.2f}",
            f"{case['bias']:+.4f} ± {case['bias_error']:.4f}",
        )
        for name, case in row["cases"].items()
    ]
    return [
        *tables.Table(("sketch", "rms error", "variance over the bound", "bias"), cells).markdown(),
        "",
        f"Inner products of {row['samples']} gradients of norm 1 (their mean cosine is "
        f"{row['mean_cosine']:.2f}), S = {row['timesteps']}, P = {row['grad_dim']:,}, K = "
        f"{row['proj_dim']:,}, {row['draws']} draws; ± one standard error. Measured on "
        f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['utc'][:10]}.",
    ]


TABLE = Table(ROOT / "docs" / "sketches.md", "sketches", table)


def measure_and_record(is_recorded: bool, smoke: bool) -> None:
    """Print a line per sketch; append the row if it is to be recorded."""
    grads, shapes = trained_gradients(20 if smoke else Recipe().steps)
    draws = 2 if smoke else DRAWS
    cases = {name: measure(grads, shapes, fields, draws) for name, fields in SKETCHES.items()}
    for name, case in cases.items():
        sys.stdout.write(f"{name}: {json.dumps(case)}\n")
    if is_recorded:
        gram = grads @ grads.T
        row = {
            "case": "sketch_statistics",
            "proj_dim": PROJ_DIM,
            "samples": SAMPLES,
            "timesteps": TIMESTEPS,
            "draws": DRAWS,
            "grad_dim": grads.shape[1],
            "mean_cosine": gram[~torch.eye(SAMPLES, dtype=torch.bool)].mean().item(),
            "cases": cases,
        }
        record(RESULTS, row)


def main() -> None:
    """Measure, or rewrite or check the page."""
    run(TABLE, __doc__, measure_and_record)


if __name__ == "__main__":
    main()
