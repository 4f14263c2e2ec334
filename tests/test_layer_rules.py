"""Layers with rules of their own, against a loop of single-sample backwards in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import relative_error
from torch import nn

from dtrak_kernels import GradientSketcher, Projection, project
from dtrak_kernels.gradients import weight as weight_gradient_module
from dtrak_kernels.gradients.rules import find_rule

PROJECTIONS = [
    Projection("none", 0),
    Projection("rademacher", 40),
    Projection("sjlt", 256),
    Projection("kronecker", 256, factor_dim=3),
]
small, steps = st.integers(1, 4), st.integers(1, 3)


def output(model, x):
    return model(x).tanh().flatten(1).cumsum(1).square().mean(1)


def check(model, x, rows_per_sample, projection):
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    assert find_rule(model[-1] if isinstance(model, nn.Sequential) else model, (x,), {})
    expected = []
    for sample in x.split(rows_per_sample):
        model.zero_grad()
        output(model, sample).sum().backward()
        expected.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    expected = torch.stack(expected)
    model.zero_grad()
    sketcher = GradientSketcher(model, projection, rows_per_sample=rows_per_sample)
    features = sketcher.sketch(lambda: output(model, x), len(x) // rows_per_sample)
    if projection.kind != "none":
        expected = project(expected, projection, shapes=sketcher.shapes)
    assert relative_error(features, expected) < 1e-11


def geometry(dimensions):
    return st.fixed_dictionaries(
        {
            "kernel_size": st.tuples(*[small] * dimensions),
            "stride": st.tuples(*[steps] * dimensions),
            "padding": st.tuples(*[st.integers(0, 2)] * dimensions),
            "dilation": st.tuples(*[st.integers(1, 2)] * dimensions),
        }
    )


@given(
    data=st.data(),
    dimensions=st.integers(1, 3),
    channels=st.tuples(small, small),
    groups=steps,
    bias=st.booleans(),
    rows_per_sample=st.integers(1, 3),
    projection=st.sampled_from(PROJECTIONS),
    workspace=st.sampled_from([200, 2**21]),
)
def test_any_convolution(
    data, dimensions, channels, groups, bias, rows_per_sample, projection, workspace
):
    options = data.draw(geometry(dimensions))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    torch.manual_seed(0)
    inputs, outputs = channels[0] * groups, channels[1] * groups
    layer = kind(inputs, outputs, groups=groups, bias=bias, **options)
    size = [7 if dimensions < 3 else 5] * dimensions
    size = [
        max(n, d * (k - 1) + 1)
        for n, d, k in zip(size, options["dilation"], options["kernel_size"], strict=True)
    ]
    x = torch.randn(2 * rows_per_sample, inputs, *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
        check(layer, x, rows_per_sample, projection)


@given(
    data=st.data(),
    dimensions=st.integers(1, 3),
    channels=st.tuples(small, small),
    groups=steps,
    more=st.booleans(),
    rows_per_sample=st.integers(1, 3),
    projection=st.sampled_from(PROJECTIONS),
    workspace=st.sampled_from([200, 2**21]),
)
def test_any_transposed_convolution(
    data, dimensions, channels, groups, more, rows_per_sample, projection, workspace
):
    options = data.draw(geometry(dimensions))
    # padding may not eat the whole output
    options["padding"] = tuple(
        min(p, d * (k - 1))
        for p, d, k in zip(
            options["padding"], options["dilation"], options["kernel_size"], strict=True
        )
    )
    largest = [max(s, d) - 1 for s, d in zip(options["stride"], options["dilation"], strict=True)]
    options["output_padding"] = tuple(min(1, n) if more else 0 for n in largest)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    torch.manual_seed(0)
    inputs, outputs = channels[0] * groups, channels[1] * groups
    layer = kind(inputs, outputs, groups=groups, **options)
    x = torch.randn(2 * rows_per_sample, inputs, *[3] * dimensions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
        check(layer, x, rows_per_sample, projection)


@given(
    features=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    positions=st.lists(small, max_size=2),
    bias=st.booleans(),
    rows_per_sample=st.integers(1, 3),
    projection=st.sampled_from(PROJECTIONS),
    workspace=st.sampled_from([200, 2**21]),
)
def test_any_linear_layer(features, positions, bias, rows_per_sample, projection, workspace):
    torch.manual_seed(0)
    layer = nn.Linear(*features, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
        x = torch.randn(2 * rows_per_sample, *positions, features[0])
        check(layer, x, rows_per_sample, projection)


@given(
    size=st.tuples(st.integers(2, 60), st.integers(1, 9)),
    tokens=st.lists(small, max_size=2),
    padding=st.sampled_from([None, 0, -1]),
    rows_per_sample=st.integers(1, 3),
    projection=st.sampled_from(PROJECTIONS),
    workspace=st.sampled_from([64, 2**21]),
)
def test_any_embedding(size, tokens, padding, rows_per_sample, projection, workspace):
    torch.manual_seed(0)
    layer = nn.Embedding(*size, padding_idx=padding)
    x = torch.randint(size[0], (2 * rows_per_sample, *tokens))
    # one token is sure to have a gradient
    x[0] = 1 if padding != -1 or size[0] > 2 else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
        check(layer, x, rows_per_sample, projection)


@pytest.mark.parametrize(
    "options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"sparse": True}], ids=str
)
def test_unusual_embeddings_are_not_taken_for_usual_ones(options):
    assert find_rule(nn.Embedding(5, 3, **options), (torch.tensor([1, 2]),), {}) is None


def test_frequency_scaling_is_recomputed_per_sample():
    torch.manual_seed(0)
    layer = nn.Embedding(5, 3, scale_grad_by_freq=True).double()
    x = torch.tensor([[1, 1, 2], [1, 3, 3]])
    features = GradientSketcher(layer, PROJECTIONS[0]).sketch(lambda: output(layer, x), 2)
    for sample in range(2):
        layer.zero_grad()
        output(layer, x[sample : sample + 1]).sum().backward()
        assert relative_error(features[sample], layer.weight.grad.flatten()) < 1e-12


def test_a_subclass_with_another_forward_has_no_rule():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert find_rule(nn.Linear(2, 2), (torch.ones(1, 2),), {})
    assert find_rule(Doubled(2, 2), (torch.ones(1, 2),), {}) is None
    assert find_rule(nn.Conv2d(2, 2, 1), (torch.ones(2, 3, 3),), {}) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_eps_of_rms_norm_in_half_precision(dtype):
    torch.manual_seed(0)
    layer, x = nn.RMSNorm(8).to(dtype), (1e-2 * torch.randn(4, 8)).to(dtype)
    features = GradientSketcher(layer, PROJECTIONS[0]).sketch(lambda: output(layer, x).float(), 4)
    for sample in range(4):
        layer.zero_grad()
        output(layer, x[sample : sample + 1]).float().sum().backward()
        assert relative_error(features[sample], layer.weight.grad) < 0.02
