"""Whitened features from the fused kernel: scales in its tiles, and low rank as a second launch."""

import copy

import pytest
import torch
from numerics import assert_as_good_as, relative_error
from test_sketch_kernel import layer_batch, sketch_of, true_gradients
from test_sketcher import looped_gradients
from test_whitening import expected_features, features_of, fitted, output, problem
from torch import nn

from dtrak_kernels import Projection, project
from dtrak_kernels.gradients.weight import LayerGradient
from dtrak_kernels.gradients.whitening.accumulator import low_rank_part
from dtrak_kernels.gradients.whitening.roots import LowRankRoot
from dtrak_kernels.sjlt.config import SketchConfig
from dtrak_kernels.sjlt.triton import launch_sketch, scales_in_tiles

SJLT = Projection("sjlt", 300, seed=3)


@pytest.mark.sweep
@pytest.mark.parametrize("is_rolled", [True, False], ids=["rolled", "shifted loads"])
@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.Linear(150, 140), (4, 3, 150)),
        (nn.Conv2d(20, 33, 3, padding=1), (4, 20, 4, 3)),
        (nn.Conv2d(6, 9, (2, 3), groups=3), (4, 6, 4, 4)),
        pytest.param(nn.Linear(5, 3), (4, 5), marks=pytest.mark.full),
    ],
    ids=["linear, many tiles", "conv", "groups", "smallest tile"],
)
def test_scales_of_entries(module, shape, is_rolled, device):
    module, x, d = layer_batch(module, shape, torch.float32, device)
    sketch = sketch_of(module, 2**15)
    scales = torch.rand(module.weight.shape, device=device).bfloat16() + 0.1
    scales[0] = 0
    config = SketchConfig(16, num_warps=4, num_stages=1, is_rolled=is_rolled)
    out = torch.zeros(2, sketch.proj_dim, device=device)
    laid = scales_in_tiles(sketch, scales)
    launch_sketch(module, x, d, sketch, out, 2, config, scales=laid)
    grads = true_gradients(module, x, d, 2) * scales.double().cpu().flatten()

    def sketched(grads):
        found = torch.zeros(2, sketch.proj_dim, dtype=grads.dtype)
        sketch.add_block(grads.unflatten(1, module.weight.shape), found)
        return found

    assert_as_good_as(out.cpu(), eager=sketched(grads.float()), oracle=sketched(grads))
    # a factor on all of it; a power of two changes no bit, but a compiler may contract what has one
    half, twice, again = (torch.zeros_like(out) for _ in range(3))
    launch_sketch(module, x, d, sketch, half, 2, config, scales=laid, scale=0.5)
    launch_sketch(module, x, d, sketch, twice, 2, config, scales=laid, scale=2.0)
    launch_sketch(module, x, d, sketch, again, 2, config, scales=laid)
    assert torch.equal(2 * half, twice / 2)
    assert relative_error(2 * half, out) < 1e-6
    assert torch.equal(out, again)


# an interpreted launch takes long
CASES = ["conv2d"]
MORE = [
    "linear, positions",
    "conv2d, 1x1",
    "conv2d, groups",
    "conv2d, circular",
    "linear",
    "conv1d",
    "conv2d, stride, dilation",
    "transposed 2d, groups",
    "group norm",
]


@pytest.mark.parametrize("kind", ["scale", "diagonal", "channels", "lowrank", "kfac"])
@pytest.mark.parametrize(
    "name", [*CASES, *[pytest.param(name, marks=pytest.mark.full) for name in MORE]]
)
def test_features_are_projected_whitened_gradients(name, kind, device):
    double, x, y = problem(name)
    expected, _ = expected_features(double, x, y, kind)
    model = copy.deepcopy(double).float().to(device)
    whitening = fitted(double, x, kind)
    # the same map and the same weights, as numbers of float32
    object.__setattr__(whitening, "model", fitted(model, x.float().to(device), "none").model)
    features = {
        implementation: features_of(
            model, y.float().to(device), SJLT, whitening, implementation=implementation, **options
        )[0].cpu()
        for implementation in ("torch", "triton")
        for options in ({},)
    }
    oracle = project(expected, SJLT, shapes=whitening.shapes)
    assert_as_good_as(features["triton"], eager=features["torch"], oracle=oracle, slack=4)
    normed, sketcher = features_of(
        model, y.float().to(device), SJLT, whitening, implementation="triton", norms=True
    )
    assert relative_error(normed, oracle) < 1e-4
    assert relative_error(sketcher.grad_norms, expected.norm(dim=1)) < 1e-4


def test_low_rank_is_a_second_launch(device, monkeypatch):
    """No slice of a gradient is formed."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(8, 5, 3, padding=1)).to(device)
    x = torch.randn(6, 8, 4, 4, device=device)
    whitening = fitted(model, x, "lowrank", 1)
    assert isinstance(whitening.parameters[0].columns, LowRankRoot)
    plain, _ = features_of(model, x, SJLT, whitening, 1, implementation="torch")
    from dtrak_kernels.gradients import accumulator

    def refuse(*args, **kwargs):
        raise AssertionError("a slice was formed")

    monkeypatch.setattr(accumulator, "weight_grads", refuse)
    monkeypatch.setattr(accumulator, "whole_contraction", refuse)
    features, sketcher = features_of(model, x, SJLT, whitening, 1, implementation="triton")
    assert relative_error(features, plain) < 1e-5
    assert "A on launch" in sketcher.plan(lambda: output(model, x), 6).layers[0].kernel


def test_the_low_rank_part_is_a_gradient_of_a_linear_layer():
    torch.manual_seed(4)
    conv = nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=1, bias=False).double()
    x = torch.randn(6, 3, 5, 6, dtype=torch.float64)
    d = torch.randn_like(conv(x))
    basis = torch.linalg.qr(torch.randn(18, 5, dtype=torch.float64))[0][None]
    root = LowRankRoot(torch.ones(1).double(), basis, torch.randn(1, 5, dtype=torch.float64))
    part = low_rank_part(LayerGradient(conv, x, d, 2), root)
    found = part.output_grads.transpose(1, 2) @ part.x
    grads = []
    for a, b in zip(x.split(2), d.split(2), strict=True):
        grads.append(torch.autograd.grad(conv(a), conv.weight, b)[0])
    matrix = torch.stack(grads).movedim(2, -1).flatten(2)
    wanted = matrix @ basis[0] @ torch.diag(root.gains[0]) @ basis[0].T
    assert relative_error(found, wanted) < 1e-12


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.compiled)]
)
def test_half_precision_layers(dtype, device):
    model, x, y = problem("conv2d")
    model, x, y = model.float().to(device), x.float().to(device), y.float().to(device)

    def f(model, x):
        with torch.autocast(device.type, dtype):
            out = model(x)
        return out.float().tanh().flatten(1).square().mean(1)

    for kind in ("scale", "diagonal", "lowrank", "kfac"):
        whitening = fitted(model, x, kind, f=f)
        torch_path, _ = features_of(model, y, SJLT, whitening, f=f, implementation="torch")
        features, _ = features_of(model, y, SJLT, whitening, f=f, implementation="triton")
        assert relative_error(features, torch_path) < 3e-3


def test_launches_without_a_whitening_keep_their_bits(device):
    """The kernel is compiled without scales: a scale of 1 is none."""
    module, x, d = layer_batch(nn.Linear(40, 30), (4, 3, 40), torch.float32, device)
    sketch = sketch_of(module, 2**12)
    plain, scaled = (torch.zeros(4, sketch.proj_dim, device=device) for _ in range(2))
    launch_sketch(module, x, d, sketch, plain)
    launch_sketch(module, x, d, sketch, scaled, scale=1.0, scales=None)
    assert torch.equal(plain, scaled)
    grads = looped_gradients(module, lambda m, rows: m(rows).flatten(1).sum(1), (x,), 1)
    assert grads.shape == (4, 1230)


def test_the_low_rank_part_of_a_layer_in_bfloat16():
    """What it takes away is most of the gradient: one rounding of it would be seen."""
    torch.manual_seed(4)
    conv = nn.Conv2d(6, 9, 3, padding=1, bias=False)
    # one direction has nearly all of the energy
    x = (torch.randn(40, 6, 6, 6) + 30).bfloat16()
    whitening = fitted(conv, x.float(), "lowrank", 1)
    root = whitening.parameters[0].columns
    assert isinstance(root, LowRankRoot)
    assert root.is_short
    d = torch.randn(40, 9, 6, 6).bfloat16()
    part = low_rank_part(LayerGradient(conv.bfloat16(), x, d, 2), root)
    assert part.x.dtype == part.output_grads.dtype == torch.bfloat16
    assert part.x.shape[1] == 2 * root.basis.shape[2]
    found = part.output_grads.double().transpose(1, 2) @ part.x.double()
    conv = conv.double()
    grads = []
    for a, b in zip(x.double().split(2), d.double().split(2), strict=True):
        grads.append(torch.autograd.grad(conv(a), conv.weight, b)[0])
    matrix = torch.stack(grads).movedim(2, -1).flatten(2)
    basis = root.basis[0].double()
    wanted = matrix @ basis @ torch.diag(root.gains[0].double()) @ basis.T
    whole = matrix * root.factor + wanted
    error = (found - wanted).norm() / whole.norm()
    assert error < 0.01
    # nearly all of it is the rounding of what the r filters give, as of any layer in bfloat16
    filters = root.basis[0].T.unflatten(1, (3, 3, -1)).movedim(-1, 1).bfloat16()
    thin = torch.nn.functional.conv2d(x, filters, padding=1).double()
    grads = torch.einsum(
        "nsohw,nsrhw->nor", d.double().unflatten(0, (-1, 2)), thin.unflatten(0, (-1, 2))
    )
    given = grads @ torch.diag(root.gains[0].double()) @ basis.T
    assert (found - given).norm() < 1e-5 * given.norm()


def test_thin_weights_are_formed_where_that_costs_less(device):
    """An adapter's: a root on its wide input at every position costs more than its gradient."""
    torch.manual_seed(0)
    few, many = (torch.randn(4, positions, 96, device=device) for positions in (1, 50))
    model = nn.Linear(96, 3, bias=False).to(device)
    whitening = fitted(model, many, "lowrank", 1, rank=40)
    for x, where in ((few, "input"), (many, "slices")):
        plain, _ = features_of(model, x, SJLT, whitening, 1, implementation="torch")
        features, sketcher = features_of(model, x, SJLT, whitening, 1, implementation="triton")
        assert relative_error(features, plain) < 1e-5
        plan = sketcher.plan(lambda x=x: output(model, x), len(x))
        assert f"A on {where}" in plan.layers[0].kernel
