"""Features of the main job, fused against the published way, in one run.

Agreement is checked first, on the very inputs timed.
"""

import statistics

import pytest
import torch

from dtrak.data import load_data
from dtrak.diffusion import digits_model
from dtrak.features import FeatureSettings, FusedExtractor, fitting_batch_size
from dtrak.outputs import select_timesteps
from dtrak.published import PUBLISHED_BATCH_SIZE, PublishedExtractor, compare
from dtrak.training import Recipe, train
from dtrak_kernels import Projection


@pytest.fixture(scope="module")
def model(smoke):
    """A digits model trained a little: a fresh one has gradients unlike a trained one's."""
    data = load_data("digits")
    return train(digits_model(), data.images, Recipe(steps=2 if smoke else 100))


def test_fused_against_published(benchmark, model, smoke, device, record):
    pytest.importorskip("trak", reason="TRAK is not installed")
    steps, proj_dim, samples = (2, 256, 3) if smoke else (10, 8192, PUBLISHED_BATCH_SIZE)
    data = load_data("digits").select(range(samples))
    settings = FeatureSettings(
        "mean_squared_l2_norm",
        tuple(select_timesteps(steps, "uniform")),
        0,
        Projection("sjlt", proj_dim),
    )
    fused = FusedExtractor(model, settings, device)
    published = PublishedExtractor(model, settings, device)
    batch = fitting_batch_size(fused, data)
    results = [compare(fused, published, data, batch) for _ in range(1 if smoke else 3)]
    assert all(result.gradient_error < 1e-5 for result in results)

    def features():
        for first in range(0, samples, batch):
            rows = slice(first, min(first + batch, samples))
            fused.extract(data.images[rows], data.ids[rows])
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "features of the main job"
    benchmark.pedantic(features, rounds=1 if smoke else 5, warmup_rounds=1)

    def median(name):
        return statistics.median(getattr(result, name) for result in results)

    figures = {
        "samples": samples,
        "timesteps": steps,
        "grad_dim": fused.grad_dim,
        "proj_dim": proj_dim,
        "fused_batch_size": batch,
        "published_batch_size": samples,
        "fused_seconds": median("fused_seconds"),
        "published_gradient_seconds": median("gradient_seconds"),
        "published_projection_seconds": median("projection_seconds"),
        "speedup": median("published_seconds") / median("fused_seconds"),
        "fused_peak_bytes": median("fused_peak_bytes"),
        "published_peak_bytes": median("published_peak_bytes"),
        "fused_largest_bytes": median("fused_largest_bytes"),
        "gradient_error": max(result.gradient_error for result in results),
        "gram_correlation": median("gram_correlation"),
    }
    benchmark.extra_info.update(figures)
    record("attribute", **figures)
