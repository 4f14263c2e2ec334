"""Features of the main job, end to end: fused against the published way on the same digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from protocol import Check, Provider, Roofs, Work, gram_error, relative_error
from races import Contest, Races
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers", reason="diffusers is not installed")

from dtrak.data.images import load_data
from dtrak.features.extraction import FeatureSettings, FusedExtractor, fitting_batch_size
from dtrak.features.published import PUBLISHED_BATCH_SIZE, PublishedExtractor
from dtrak.features.timesteps import select_timesteps
from dtrak.models.unet import UNet, digits_model
from dtrak.training.trainer import Recipe, train
from dtrak_kernels import Projection, project

# what is compared is exact
pytestmark = pytest.mark.usefixtures("whole_float32")

FUSED = "fused"
GRADIENTS, PROJECTION = "published: vmap(grad), step by step", "published: TRAK's projector"


@pytest.fixture(scope="module")
def model(smoke: bool) -> UNet:
    """A digits model trained a little: a fresh one has gradients unlike a trained one's."""
    data = load_data("digits")
    return train(digits_model(), data.images, Recipe(steps=2 if smoke else 100))


def make_contest(model: UNet, device: torch.device, smoke: bool) -> Contest:
    """Fused in batches that fit, published in one batch of the published size."""
    steps, K, samples = (2, 256, 3) if smoke else (10, 8192, PUBLISHED_BATCH_SIZE)
    data = load_data("digits").select(range(samples))
    settings = FeatureSettings(
        "mean_squared_l2_norm",
        tuple(select_timesteps(steps, "uniform")),
        0,
        Projection("sjlt", K),
    )
    wide = PublishedExtractor(model, replace(settings, dtype="float64"), device)
    truth = wide.gradients(data.images, data.ids).float()
    del wide
    fused = FusedExtractor(model, settings, device)
    batch = fitting_batch_size(fused, data)
    P = fused.grad_dim

    def run_fused() -> Tensor:
        parts = []
        for first in range(0, samples, batch):
            rows = slice(first, min(first + batch, samples))
            parts.append(fused.extract(data.images[rows], data.ids[rows]))
        return torch.cat(parts)

    def gradients() -> Callable[[], Tensor]:
        # the projector's block of the matrix is there from the start, as in the scripts
        published = PublishedExtractor(model, settings, device)
        return lambda: published.gradients(data.images, data.ids)

    def projection() -> Callable[[], Tensor]:
        return partial(PublishedExtractor(model, settings, device).project, truth)

    with FlopCounterMode(display=False) as counter:
        run_fused()
    read = 4.0 * (P + data.images.numel())
    flops = float(counter.get_total_flops())
    exact = "vmap(grad) in float64"
    projected = project(truth, settings.projection, shapes=fused.sketcher.shapes)
    return Contest(
        suite="attribute",
        group="features of the main job",
        sizes={"N": samples, "S": steps, "P": P, "K": K},
        baselines=(GRADIENTS,),
        providers=[
            Provider(
                GRADIENTS,
                gradients,
                (Check(exact, partial(relative_error, oracle=truth), 1e-5),),
                Work(flops, read + 4.0 * samples * P),
            ),
            Provider(
                PROJECTION,
                projection,
                (
                    Check(
                        "the gradients' inner products, in units of theory",
                        partial(gram_error, grads=truth),
                        1.6,
                    ),
                ),
                Work(2.0 * samples * P * K, 4.0 * samples * (P + K)),
            ),
            Provider(
                FUSED,
                lambda: run_fused,
                (
                    Check(
                        f"{exact}, projected",
                        partial(relative_error, oracle=projected),
                        1e-5,
                    ),
                ),
                Work(flops, read + 4.0 * samples * K),
            ),
        ],
        facts={"fused_batch_size": batch, "published_batch_size": samples},
    )


@pytest.mark.parametrize("name", [GRADIENTS, PROJECTION, FUSED])
def test_attribute(
    benchmark: Any,
    name: str,
    model: UNet,
    races: Races,
    roofs: Callable[[str], Roofs],
    device: torch.device,
    smoke: bool,
) -> None:
    pytest.importorskip("trak", reason="TRAK is not installed")
    build = partial(make_contest, model, device, smoke)
    races.present(benchmark, "attribute", name, build, roofs)
