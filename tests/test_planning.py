"""The plan of a batch: figures worked out by hand, and what a batch really allocates."""

import copy

import pytest
import torch
from test_sketcher import small_unet, unet_output, unet_rows
from torch import nn

from dtrak_kernels import GradientSketcher, Projection

KINDS = [
    Projection("none", 0),
    Projection("rademacher", 64),
    Projection("sjlt", 1024),
    Projection("kronecker", 1024, factor_dim=4),
]


def plan_of(model, x, projection, rows_per_sample=1, **options):
    sketcher = GradientSketcher(model, projection, rows_per_sample=rows_per_sample)
    return sketcher.plan(lambda: model(x), len(x) // rows_per_sample, **options)


def test_a_convolution_by_hand():
    conv, x = nn.Conv2d(6, 10, 3, padding=1), torch.randn(8, 6, 5, 7)
    plan = plan_of(conv, x, KINDS[2], 2)
    (layer,) = plan.layers
    assert (layer.name, layer.kind, layer.positions) == ("Conv2d", "Conv2d", 2 * 35)
    assert layer.parameters == {"weight": (10, 6, 3, 3), "bias": (10,)}
    assert layer.kernel == "sliced gradient, sparse sketch (torch)"
    weight = 2 * 8 * 35 * 10 * 54
    # the product, a sign per entry and sample, then the same for the bias
    assert layer.flop == weight + 2 * 4 * 540 + 2 * 8 * 350 + 2 * 4 * 10
    assert plan.model_flop == 2 * weight
    assert layer.kept_bytes == 4 * x.numel()
    assert plan.feature_bytes == 4 * 4 * 1024


def test_the_two_sided_product_by_hand():
    linear, x = nn.Linear(100, 60, bias=False), torch.randn(8, 100)
    (layer,) = plan_of(linear, x, Projection("kronecker", 512, factor_dim=5)).layers
    assert layer.kernel == "thin products"
    assert layer.flop == 2 * 8 * (5 * 100 + 5 * 60 + 25 + 25) + 2 * 8 * 60


def test_a_dense_projection_costs_its_matrix():
    linear, x = nn.Linear(100, 60, bias=False), torch.randn(8, 100)
    (layer,) = plan_of(linear, x, Projection("rademacher", 500)).layers
    assert layer.flop == 2 * 8 * 6000 * (1 + 500) + 2 * 8 * 60


@pytest.mark.parametrize("projection", KINDS, ids=lambda p: p.kind)
def test_nothing_larger_than_planned_is_allocated(projection):
    from dtrak.runs.measure import TensorMeter

    model = copy.deepcopy(small_unet(block_out_channels=(32, 64), norm_num_groups=8)).float()
    x, t = unet_rows(8, 1)
    x = x.float()
    sketcher = GradientSketcher(model, projection, rows_per_sample=2)
    plan = sketcher.plan(lambda: model(x, t), 4)
    with TensorMeter(known=[x, t, *model.state_dict().values()]) as meter:
        sketcher.sketch(lambda: unet_output(model, x, t), 4)
    work = max(layer.work_bytes for layer in plan.layers)
    kept = max(layer.kept_bytes for layer in plan.layers)
    # a signed copy of a whole gradient of the small model is what the exact kind returns
    assert meter.largest_bytes <= 1.5 * max(work, kept, plan.feature_bytes)
    assert meter.largest_bytes >= 0.3 * max(work, kept, plan.feature_bytes)


def test_a_budget():
    model, x = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50)), torch.randn(16, 50)
    generous = plan_of(model, x, KINDS[2], memory_budget=10**8)
    assert generous.misfits() == []
    assert "fits 100 MB" in str(generous)
    tight = plan_of(model, x, KINDS[2], memory_budget=200_000)
    assert tight.fitting_samples < 16
    line = tight.misfits()[-1]
    assert line.startswith("batch of 16: needs ")
    assert line.endswith(f"; {tight.fitting_samples} samples fit")
    fitting = plan_of(model, x[: tight.fitting_samples], KINDS[2], memory_budget=200_000)
    assert fitting.misfits() == []
    with pytest.raises(ValueError, match="num_samples must be an int of at least 1, got 0"):
        GradientSketcher(model, KINDS[2]).plan(lambda: model(x), 0)
    hopeless = plan_of(model, x, KINDS[2], memory_budget=1000)
    assert any(line.startswith("0: needs") for line in hopeless.misfits())
    assert any(line.startswith("features: need") for line in hopeless.misfits())
    assert plan_of(model, x, KINDS[2]).misfits() == []
    with pytest.raises(ValueError, match="memory_budget must be at least 1 byte, got 0"):
        plan_of(model, x, KINDS[2], memory_budget=0)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.shape, self.unused = nn.Embedding(9, 6), nn.PReLU(6), nn.Linear(2, 2)
        self.norm, self.up = nn.LayerNorm(6), nn.ConvTranspose1d(6, 4, 2)

    def forward(self, x):
        x = self.norm(self.norm(self.embed(x))).movedim(2, 1)
        return self.up(self.shape(x))


def test_every_kind_of_layer_and_the_table():
    model, x = Mixed(), torch.randint(9, (4, 5))
    plan = plan_of(model, x, KINDS[2])
    assert [layer.name for layer in plan.layers] == ["embed", "norm", "norm", "shape", "up"]
    assert [layer.kernel for layer in plan.layers][1:4] == [
        "rule",
        "rule",
        "recomputed one sample at a time",
    ]
    assert [layer.positions for layer in plan.layers] == [5, 5, 5, 1, 5]
    assert plan.unused == ("unused.weight", "unused.bias")
    text = str(plan)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["layer", "kind", "parameters", "T"]
    assert "weight[6x4x2] bias[4]" in text
    assert "not used, so zero: unused.weight, unused.bias" in text
    assert "sjlt, K = 1,024, 4 samples" in text
    # columns line up
    assert len({line.index("weight") for line in lines[1:6]}) == 1


def test_planning_computes_no_gradient_and_leaves_no_hook():
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    plan_of(model, x, KINDS[0])
    assert not model._forward_hooks
    assert model.weight.grad is None
    assert model.weight.requires_grad


def test_two_sided_sketches_keep_thin_inputs():
    from dtrak.runs.measure import TensorMeter

    linear, x = nn.Linear(100, 60), torch.randn(80, 100)
    (layer,) = plan_of(linear, x, Projection("kronecker", 512, factor_dim=5)).layers
    assert layer.kept_bytes == 4 * 80 * 5
    up = nn.ConvTranspose1d(12, 8, 3, groups=2)
    (layer,) = plan_of(up, torch.randn(4, 12, 10), Projection("kronecker", 64, factor_dim=3)).layers
    assert layer.kept_bytes == 4 * (4 * 2) * 3 * 10
    # and nothing else: ten layers, whose inputs autograd has no use for
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(10)))
    sketcher = GradientSketcher(model, Projection("kronecker", 512, factor_dim=5))
    # the factors are made once
    sketcher.sketch(lambda: model(x).square().mean(1), 80)
    with TensorMeter(known=[x, *model.state_dict().values()]) as meter:
        sketcher.sketch(lambda: model(x).square().mean(1), 80)
    assert meter.peak_bytes < 6 * x.numel() * 4 + 80 * 512 * 4
