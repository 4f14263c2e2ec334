import pytest
import torch
from numerics import relative_error
from test_features import CPU, make_data, make_model

from dtrak.features.extraction import FeatureSettings, FusedExtractor
from dtrak.features.published import PublishedExtractor, compare, make_trak_projector
from dtrak_kernels import Projection, project

pytest.importorskip("trak", reason="TRAK is not installed")


def settings(kind="sjlt", proj_dim=1024, function="mean_squared_l2_norm", dtype="float64"):
    return FeatureSettings(function, (0, 300, 900), 5, Projection(kind, proj_dim, 3), dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("function", ["mean_squared_l2_norm", "loss", "l1_norm", "weighted_mse"])
@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_fused_features_are_the_published_gradients_projected(kind, function):
    data = make_data(4)
    chosen = settings(kind, function=function)
    fused = FusedExtractor(make_model(), chosen, CPU)
    grads = PublishedExtractor(make_model(), chosen, CPU).gradients(data.images, data.ids)
    expected = project(grads, chosen.projection, shapes=fused.sketcher.shapes)
    # fused attention is good to 1e-7 in float64
    assert relative_error(fused.extract(data.images, data.ids), expected) < 1e-6


# slow: statistical; the features themselves are compared in the fast lane
@pytest.mark.full
def test_inner_products_agree_with_trak():
    data = make_data(12)
    chosen = settings(proj_dim=8192, dtype="float32")
    result = compare(
        FusedExtractor(make_model(), chosen, CPU),
        PublishedExtractor(make_model(), chosen, CPU),
        data,
        fused_batch_size=5,
    )
    assert result.samples == 12
    assert result.gradient_error < 1e-5
    assert result.gram_correlation > 0.9
    assert result.published_peak_bytes > 4 * 12 * make_grad_dim()
    assert result.fused_largest_bytes < 4 * 12 * make_grad_dim()


def make_grad_dim():
    return sum(p.numel() for p in make_model().module.parameters())


def test_the_scale_is_ours():
    """E[R Rᵀ] = I: squared norms survive."""
    chosen = settings(proj_dim=4096)
    published = PublishedExtractor(make_model(), chosen, CPU)
    grads = torch.randn(3, published.grad_dim, dtype=torch.float32)
    norms = published.project(grads).square().sum(1) / grads.square().sum(1)
    assert ((norms - 1).abs() < 5 * (2 / 4096) ** 0.5).all()


def test_refusals():
    with pytest.raises(
        ValueError, match="dtype must be float32 or float64 for --no-fused, got 'bfloat16'"
    ):
        PublishedExtractor(make_model(), settings(dtype="bfloat16"), CPU)
    with pytest.raises(ValueError, match="must be rademacher, normal or sjlt for TRAK's projector"):
        make_trak_projector(10, Projection("none", 0), CPU)
