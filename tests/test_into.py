"""Gradients that go to a destination of the caller's instead of a projection."""

import pytest
import torch
from numerics import relative_error
from test_sketcher import looped_gradients, small_unet, unet_output, unet_rows
from torch import nn

from dtrak_kernels import Accumulator, GradientSketcher, LayerGradient, Projection


class SecondMoments(Accumulator):
    """Sums of squared entries over the samples; no features at all."""

    def __init__(self, shapes):
        super().__init__(shapes, num_features=0)
        size = sum(torch.Size(shape).numel() for shape in shapes)
        self.total = torch.zeros(size, dtype=torch.float64)

    def add(self, index, grads, out, samples, first_row=0):
        offset, flat = self.flatten(index, grads, first_row)
        self.total[offset : offset + flat.shape[1]] += flat.square().sum(0)


class LayerNorms(Accumulator):
    """One feature a parameter: the squared norm of its gradient."""

    def __init__(self, shapes):
        super().__init__(shapes, num_features=len(shapes))

    def add(self, index, grads, out, samples, first_row=0):
        out[samples, index] += grads.flatten(1).square().sum(1)


class Unformed(LayerNorms):
    """Counts the layers whose gradients it is offered before they are formed."""

    def __init__(self, shapes):
        super().__init__(shapes)
        self.offered = []

    def add_weight(self, index, layer, out):
        assert isinstance(layer, LayerGradient)
        self.offered.append((index, layer.num_samples))
        super().add_weight(index, layer, out)


@pytest.fixture(scope="module")
def problem():
    model, (x, t) = small_unet(), unet_rows(3, 2)
    return model, (x, t), looped_gradients(model, unet_output, (x, t), 2)


def test_what_a_destination_keeps_itself(problem):
    model, inputs, grads = problem
    sketcher = GradientSketcher(model, into=SecondMoments, rows_per_sample=2)
    features = sketcher.sketch(lambda: unet_output(model, *inputs), 3)
    assert features.shape == (3, 0)
    assert relative_error(sketcher.into.total, grads.square().sum(0)) < 1e-10


def test_features_of_a_destination(problem):
    model, inputs, grads = problem
    sketcher = GradientSketcher(model, into=LayerNorms, rows_per_sample=2)
    assert sketcher.proj_dim == len(sketcher.shapes)
    sizes = [torch.Size(shape).numel() for shape in sketcher.shapes]
    expected = torch.stack([part.square().sum(1) for part in grads.split(sizes, dim=1)], 1)
    features = sketcher.sketch(lambda: unet_output(model, *inputs), 3)
    assert relative_error(features, expected) < 1e-10
    whole = GradientSketcher(model, Projection("none"), rows_per_sample=2, norms=True)
    whole.sketch(lambda: unet_output(model, *inputs), 3)
    assert relative_error(features.sum(1).sqrt(), whole.grad_norms) < 1e-10


def test_layers_are_offered_before_they_are_formed():
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Conv1d(3, 2, 1))
    x = torch.randn(7, 3, 5)
    sketcher = GradientSketcher(model, into=Unformed)
    sketcher.sketch(lambda: model(x).flatten(1).sum(1), 7)
    names = [sketcher.parameter_names[index] for index, _ in sketcher.into.offered]
    assert sorted(names) == ["0.weight", "2.weight"]
    assert {samples for _, samples in sketcher.into.offered} == {7}


def test_norms_beside_a_destination():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    sketcher = GradientSketcher(model, into=LayerNorms, norms=True)
    features = sketcher.sketch(lambda: model(x).square().sum(1), 6)
    assert relative_error(sketcher.grad_norms, features.sum(1).sqrt()) < 1e-6


def test_a_plan_names_the_destination():
    model, x = nn.Linear(5, 4), torch.randn(6, 5)
    plan = GradientSketcher(model, into=SecondMoments).plan(lambda: model(x), 6)
    assert "SecondMoments, K = 0, 6 samples" in str(plan)
    assert [layer.kernel for layer in plan.layers] == ["sliced gradient (torch)"]
    assert plan.feature_bytes == 0


def test_refusals():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="one of projection and into must be given, got neither"):
        GradientSketcher(model)
    with pytest.raises(ValueError, match="one of projection and into must be given, got both"):
        GradientSketcher(model, Projection("none"), into=LayerNorms)
    with pytest.raises(ValueError, match="implementation must be None with into, got 'torch'"):
        GradientSketcher(model, into=LayerNorms, implementation="torch")
    with pytest.raises(TypeError, match="into must make an Accumulator, got list"):
        GradientSketcher(model, into=list)


def test_a_projection_of_kind_none_needs_no_width():
    assert Projection("none") == Projection("none", 0)
    with pytest.raises(ValueError, match="proj_dim must be at least 1, got 0"):
        Projection("sjlt")
