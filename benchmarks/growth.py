"""Time and peak memory against N, P, S, K and B: one race per point, an exponent per curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import linear_regression
from typing import Any

import peers
import torch
from protocol import Check, Outcome, Provider, Work, race, relative_error
from torch import Tensor, nn
from workloads import Workload, diffusers, random_rows, sample_of

from dtrak_kernels import GradientSketcher, Projection, project
from dtrak_kernels.ridge import RidgeSolver

SOLVING = "N (solve)"
AXES = ("N", SOLVING, "P", "S", "K", "B")
SJLT, RADEMACHER = "sketcher, sjlt", "sketcher, rademacher"
VMAP = "vmap(grad), then index_add_"
STREAM, SOLVE = "sketcher, sjlt, N samples in batches", "dual solve"
# a dense matrix costs what P and K say, K is nothing to vmap(grad)
CURVES = {
    "N": (STREAM,),
    SOLVING: (SOLVE,),
    "P": (SJLT, RADEMACHER, VMAP),
    "S": (SJLT, VMAP),
    "K": (SJLT, RADEMACHER),
    "B": (SJLT, VMAP),
}
# float32 rounding of a deep network's gradients
_ALLOWED = 1e-4
# queries of the solve
_QUERIES = 16


@dataclass(frozen=True)
class Point:
    """One size. ``width`` is that of the U-Net, which decides P."""

    N: int
    width: int
    S: int
    K: int
    B: int


@dataclass(frozen=True)
class Plan:
    """Where the curves run.

    Attributes:
        base: what is held fixed on the other axes.
        values: points per axis; of ``width`` for axis P.
        dense: K of the dense kind away from axis K, where it is that of the others.
        size: pixels per side.
        levels: resolutions of the U-Net.
    """

    base: Point
    values: dict[str, tuple[int, ...]]
    dense: int
    size: int
    levels: int = 2


PLANS = {
    "cuda": Plan(
        Point(N=4000, width=64, S=4, K=32768, B=16),
        {
            # a batch of a small U-Net takes what launching its kernels takes, tens of milliseconds
            "N": (16, 64, 256, 1024),
            SOLVING: (1000, 2000, 4000, 8000),
            "P": (32, 64, 128, 256),
            "S": (1, 4, 16, 64),
            "K": (4096, 16384, 65536, 131072),
            "B": (4, 16, 64, 256),
        },
        dense=4096,
        size=32,
    ),
    "cpu": Plan(
        Point(N=32, width=16, S=4, K=4096, B=4),
        {
            "N": (8, 16, 32, 64),
            SOLVING: (128, 256, 512, 1024),
            "P": (8, 16, 32, 48),
            "S": (2, 4, 8, 16),
            "K": (512, 1024, 2048, 4096),
            "B": (2, 4, 8, 16),
        },
        dense=128,
        size=8,
    ),
    "smoke": Plan(
        Point(N=8, width=8, S=1, K=256, B=2),
        {"N": (2, 4), SOLVING: (8, 16), "P": (8, 16), "S": (1, 2), "K": (256, 512), "B": (1, 2)},
        dense=32,
        size=8,
        levels=1,
    ),
}


def make_unet(width: int, size: int, levels: int) -> nn.Module:
    """Attention at every resolution but the first; P grows as the square of the width."""
    down = ("DownBlock2D", *("AttnDownBlock2D" for _ in range(levels - 1)))
    return (
        diffusers()
        .UNet2DModel(
            sample_size=size,
            in_channels=1,
            out_channels=1,
            block_out_channels=tuple(width * 2**level for level in range(levels)),
            layers_per_block=1,
            down_block_types=down,
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
            add_attention=False,
        )
        .eval()
    )


def make_workload(point: Point, plan: Plan, device: torch.device, samples: int) -> Workload:
    """A batch of the U-Net of a point."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = make_unet(point.width, plan.size, plan.levels).to(device)
    inputs = random_rows(samples, point.S, (1, plan.size, plan.size), device)
    return Workload("U-Net", unet, inputs, point.S, "float32", sample_of)


def _sketching(workload: Workload, projection: Projection) -> Callable[[], Callable[[], Tensor]]:
    def prepare() -> Callable[[], Tensor]:
        sketcher = GradientSketcher(
            workload.model, projection, rows_per_sample=workload.rows_per_sample
        )
        return lambda: sketcher.sketch(workload.outputs, workload.samples)

    return prepare


def batch_providers(
    axis: str, point: Point, plan: Plan, device: torch.device
) -> tuple[int, list[Provider]]:
    """P, and those who make features of one batch."""
    workload = make_workload(point, plan, device, point.B)
    grads = peers.loop_gradients(workload)
    shapes = [tuple(parameter.shape) for parameter in workload.parameters.values()]
    sparse = Projection("sjlt", point.K, 1)
    dense = Projection("rademacher", point.K if axis == "K" else plan.dense, 1)
    work = Work(0.0, 0.0)

    def check(projection: Projection) -> tuple[Check, ...]:
        expected = project(grads, projection, shapes=shapes)
        error = partial(relative_error, oracle=expected)
        return (Check("single backwards, projected", error, _ALLOWED),)

    def then_project() -> Callable[[], Tensor]:
        return lambda: count_sketch(peers.vmap_gradients(workload))

    count_sketch = peers.count_sketch(workload.grad_dim, point.K, device)
    counted = partial(relative_error, oracle=count_sketch(grads))
    like_counted = (Check("single backwards, projected by the same", counted, _ALLOWED),)
    found = [Provider(SJLT, _sketching(workload, sparse), check(sparse), work)]
    if RADEMACHER in CURVES[axis]:
        found.append(Provider(RADEMACHER, _sketching(workload, dense), check(dense), work))
    if VMAP in CURVES[axis]:
        found.append(Provider(VMAP, then_project, like_counted, work))
    return workload.grad_dim, found


def stream_providers(point: Point, plan: Plan, device: torch.device) -> list[Provider]:
    """Features of N samples, batch after batch."""
    batches = -(-point.N // point.B)
    workload = make_workload(point, plan, device, point.B)
    projection = Projection("sjlt", point.K, 1)
    shapes = [tuple(parameter.shape) for parameter in workload.parameters.values()]
    # what one batch must give; every batch is this one
    expected = project(peers.loop_gradients(workload), projection, shapes=shapes)

    def stream() -> Callable[[], Tensor]:
        sketch = _sketching(workload, projection)()

        def run() -> Tensor:
            out = torch.empty(batches * point.B, projection.proj_dim, device=device)
            for first in range(0, len(out), point.B):
                out[first : first + point.B] = sketch()
            return out

        return run

    def error(result: Tensor) -> float:
        return relative_error(result, expected.repeat(batches, 1))

    check = Check("single backwards, projected", error, _ALLOWED)
    return [Provider(STREAM, stream, (check,), Work(0.0, 0.0))]


def solve_providers(point: Point, device: torch.device) -> list[Provider]:
    """Scores of a few queries from N features."""
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(point.N, point.K, generator=generator, device=device)
    queries = torch.randn(_QUERIES, point.K, generator=generator, device=device)
    damping = float(point.K)

    def solve() -> Tensor:
        return RidgeSolver(features).scores(queries, damping)

    def error(result: Tensor) -> float:
        wide = features.double()
        gram = wide @ wide.T
        gram.diagonal().add_(damping)
        oracle = (queries.double() @ wide.T) @ torch.linalg.inv(gram)
        return relative_error(result, oracle)

    check = Check("an inverse in float64", error, 1e-5)
    return [Provider(SOLVE, lambda: solve, (check,), Work(0.0, 0.0))]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y against log x, by least squares."""
    return linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def sweep(
    axis: str, device: torch.device, *, smoke: bool = False
) -> tuple[dict[str, list[Outcome]], list[int], dict[str, int]]:
    """Race at every point of an axis.

    Args:
        axis: one of `AXES`.
        device: where.
        smoke: two tiny points, one round each.

    Returns:
        Outcomes per curve, the points (P itself for axis P), and the sizes held fixed.
    """
    plan = PLANS["smoke" if smoke else device.type]
    field = {"P": "width", SOLVING: "N"}.get(axis, axis)
    curves: dict[str, list[Outcome]] = {}
    xs: list[int] = []
    grad_dim = 0
    for value in plan.values[axis]:
        point = replace(plan.base, **{field: value})
        if axis == "N":
            providers = stream_providers(point, plan, device)
        elif axis == SOLVING:
            providers = solve_providers(point, device)
        else:
            grad_dim, providers = batch_providers(axis, point, plan, device)
        xs.append(grad_dim if axis == "P" else value)
        options: dict[str, Any] = {"rounds": (1, 1)} if smoke else {"rounds": (3, 7)}
        for name, outcome in race(providers, device, seconds=0.15, **options).items():
            if outcome.failure:
                raise AssertionError(f"{name} at {axis} = {xs[-1]}: {outcome.failure}")
            curves.setdefault(name, []).append(outcome)
    base = plan.base
    fixed = {"S": base.S, "K": base.K, "B": base.B}
    if axis == SOLVING:
        fixed = {"K": base.K, "M": _QUERIES}
    elif axis != "N":
        fixed["P"] = grad_dim
    if axis == "P":
        fixed["K of rademacher"] = plan.dense
    return curves, xs, {name: size for name, size in fixed.items() if not name.startswith(axis)}


def figures(outcomes: Sequence[Outcome], xs: Sequence[int]) -> dict[str, Any]:
    """A curve's row: a list per quantity, and exponents of the whole and of its last step."""
    percentiles = [outcome.percentiles for outcome in outcomes]
    peaks = [outcome.peak_bytes for outcome in outcomes]
    middle = [p50 for _, p50, _ in percentiles]
    return {
        "x": list(xs),
        "p20_seconds": [p20 for p20, _, _ in percentiles],
        "p50_seconds": middle,
        "p80_seconds": [p80 for _, _, p80 in percentiles],
        "peak_bytes": peaks,
        "time_exponent": exponent(xs, middle),
        "time_exponent_end": exponent(xs[-2:], middle[-2:]),
        "memory_exponent": exponent(xs, peaks),
        "memory_exponent_end": exponent(xs[-2:], peaks[-2:]),
        "rounds": min(len(outcome.seconds) for outcome in outcomes),
    }
