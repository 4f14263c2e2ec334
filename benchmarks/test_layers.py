"""The price of a backward, layer by layer: every distinct layer of the U-Nets on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from prices import STEP, make_contest, projection_name, projections
from protocol import Roofs
from races import Contest, Races
from workloads import LayerShape, layer, unet_layers

from dtrak_kernels import Projection
from dtrak_kernels.projection import DENSE_KINDS

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# one of each sort where time is short: plain, strided, 1x1, at high and low resolution, linear
FEW = (
    "conv3x3 32→32 @32x32",
    "conv3x3/2 64→64 @16x16",
    "conv1x1 128→64 @16x16",
    "conv3x3 64→64 @8x8",
    "linear 64→64 @256",
    "linear 128→128 @1",
)
EINSUM = "hooks and einsum"
# CIFAR's on a GPU; the oracle of all layers of Stable Diffusion takes a minute at that size
SAMPLES, ROWS = (16, 10) if CUDA else (8, 4)
SAMPLES_SD, ROWS_SD = 8, 4


def wanted() -> list[Projection]:
    """The kinds that differ; without the dense one, which makes a slow matrix, on a CPU."""
    found = projections((32768 if CUDA else 8192,), (4096,))
    left_out = ("normal", "none") if CUDA else ("none", *DENSE_KINDS)
    return [projection for projection in found if projection.kind not in left_out]


def make_cases() -> Iterator[tuple[str, LayerShape, str]]:
    """Model, layer, dtype."""
    # float32 last, and for CIFAR only: nobody runs Stable Diffusion in it
    for dtype in ("bfloat16", "float32") if CUDA else ("float32",):
        for model, shapes in unet_layers(DEVICE).items():
            if CUDA and dtype == "float32" and model.startswith("SD"):
                continue
            yield from ((model, s, dtype) for s in shapes if CUDA or s.name in FEW)


PROVIDERS = (STEP, *(projection_name(projection) for projection in wanted()), EINSUM)
CASES = [
    pytest.param(*case, name, id=f"{case[0]}-{case[1].name}-{case[2]}-{name}")
    for case in make_cases()
    for name in PROVIDERS
]


@pytest.mark.parametrize("model, shape, dtype, name", CASES)
def test_layer(
    benchmark: Any,
    model: str,
    shape: LayerShape,
    dtype: str,
    name: str,
    races: Races,
    roofs: Callable[[str], Roofs],
    device: torch.device,
    smoke: bool,
) -> None:
    def build() -> Contest:
        large = (SAMPLES_SD, ROWS_SD) if model.startswith("SD") else (SAMPLES, ROWS)
        samples, rows = (2, 1) if smoke else large
        workload = layer(shape, device, samples, rows, dtype)
        contest = make_contest(workload, "layers", wanted(), gradients=[EINSUM])
        facts = {"model": model, "layers_like_it": shape.count}
        return replace(
            contest, group=f"{model}: {contest.group}", facts=facts, seconds=0.05 if CUDA else 0.2
        )

    races.present(benchmark, ("layer", model, shape, dtype), name, build, roofs)
