"""Weight gradients in slices: both ways of a convolution, and what they allocate."""

import copy
import itertools

import pytest
import torch
from numerics import relative_error
from torch import nn

from dtrak_kernels.gradients import weight as weight_gradient_module
from dtrak_kernels.gradients.weight import (
    LayerGradient,
    choose_contraction,
    grouped_grads,
    prefers_grouped,
    weight_grads,
)


def gathered(module, x, output_grads, rows_per_sample, **options):
    samples = len(x) // rows_per_sample
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.zeros(samples, len(module.weight), module.weight[0].numel(), dtype=dtype)
    covered = torch.zeros(samples, len(module.weight))
    for part in weight_grads(LayerGradient(module, x, output_grads, rows_per_sample), **options):
        assert part.grads.dtype == dtype
        total[part.samples, part.rows] += part.grads
        covered[part.samples, part.rows] += 1
    assert (covered == 1).all()
    return total


def looped(module, x, output_grads, rows_per_sample):
    """By autograd, one sample at a time, in the column order of the sketches."""
    grads = []
    for part, delta in zip(
        x.split(rows_per_sample), output_grads.split(rows_per_sample), strict=True
    ):
        (grad,) = torch.autograd.grad(module(part), module.weight, delta)
        grads.append(grad.movedim(1, -1).flatten(1))
    return torch.stack(grads)


GEOMETRIES = [
    {"kernel_size": (3, 3), "padding": 1},
    {"kernel_size": (1, 1), "stride": (2, 1)},
    {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": (3, 2), "padding": (2, 1), "stride": (2, 3), "dilation": (2, 1)},
    {"kernel_size": (3, 3), "padding": (1, 2), "padding_mode": "circular"},
]


@pytest.mark.sweep(2)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("workspace", [2**21, 600], ids=["one slice", "many slices"])
@pytest.mark.parametrize("rows_per_sample", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_samples_as_groups(geometry, rows_per_sample, workspace, monkeypatch):
    """The grouped convolution of float32 on a CPU against autograd in float64."""
    monkeypatch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
    for (inputs, outputs), all_samples in itertools.product([(1, 4), (6, 5)], [False, True]):
        torch.manual_seed(0)
        conv = nn.Conv2d(inputs, outputs, **geometry).double()
        x = torch.randn(3 * rows_per_sample, inputs, 10, 9, dtype=torch.float64)
        output_grads = torch.randn_like(conv(x))
        expected = looped(conv, x, output_grads, rows_per_sample)
        conv, x, output_grads = conv.float(), x.float(), output_grads.float()
        assert prefers_grouped(LayerGradient(conv, x, output_grads, rows_per_sample))
        # whatever else may be better for this case
        monkeypatch.setattr(weight_gradient_module, "choose_contraction", lambda *_: grouped_grads)
        actual = gathered(conv, x, output_grads, rows_per_sample, all_samples=all_samples)
        assert relative_error(actual, expected) < 1e-6


FEW_OUTPUTS = [
    nn.Conv2d(16, 1, 3, padding=1),
    nn.Conv2d(12, 2, (3, 2), padding=(0, 1), dilation=(2, 1)),
    nn.Conv2d(16, 1, (4, 2), padding="same", dilation=(1, 2)),
    nn.Conv1d(9, 2, 5, padding=4),
    nn.Conv3d(27, 3, (3, 1, 2), padding=(1, 0, 0)),
]
UNTRADED = [
    nn.Conv2d(16, 1, 3, padding=1, stride=2),
    nn.Conv2d(16, 1, 3, padding=3),
    nn.Conv2d(16, 1, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(12, 3, 3),
]
POINTWISE = [nn.Conv2d(5, 7, 1), nn.Conv1d(4, 3, 1)]


@pytest.mark.sweep(2)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("workspace", [2**21, 3000], ids=["one slice", "many slices"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_per_sample", [1, 3])
@pytest.mark.parametrize(
    "module, form",
    [
        *((module, "traded_grads") for module in FEW_OUTPUTS),
        *((module, "another") for module in UNTRADED),
        *((module, "pointwise_grads") for module in POINTWISE),
        (nn.Conv2d(1, 8, 3), "patches"),
        (nn.Linear(5, 7), "linear_grads"),
    ],
    ids=str,
)
def test_every_form(module, form, rows_per_sample, dtype, workspace, monkeypatch):
    """Against autograd in float64, one sample at a time."""
    monkeypatch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
    torch.manual_seed(0)
    wide = copy.deepcopy(module).double()
    shape = (6, 5) if isinstance(module, nn.Linear) else (module.in_channels, 9, 8, 7)
    shape = shape[: max(module.weight.ndim - 1, 2)]
    x = torch.randn(3 * rows_per_sample, *shape, dtype=torch.float64)
    output_grads = torch.randn_like(wide(x))
    expected = looped(wide, x, output_grads, rows_per_sample)
    x, output_grads = x.to(dtype), output_grads.to(dtype)
    chosen = getattr(
        choose_contraction(LayerGradient(module, x, output_grads, rows_per_sample)),
        "__name__",
        "patches",
    )
    if form == "another":
        assert chosen != "traded_grads"
    elif workspace > 3000:
        assert chosen == form
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for all_samples in (False, True):
        actual = gathered(
            copy.deepcopy(module).to(dtype),
            x,
            output_grads,
            rows_per_sample,
            all_samples=all_samples,
        )
        assert relative_error(actual, expected) < tolerance


def test_half_precision_products_are_never_rounded():
    """Forms that copy nothing would multiply in 16 bits."""
    x = torch.randn(4, 16, 6, 6)
    for layer, inputs in ((nn.Linear(6, 5), x), (nn.Conv2d(16, 3, 1), x), (nn.Conv2d(16, 1, 3), x)):
        output_grads = torch.randn_like(layer(inputs)).bfloat16()
        expected = looped(
            copy.deepcopy(layer).double(), inputs.bfloat16().double(), output_grads.double(), 2
        )
        actual = gathered(layer, inputs.bfloat16(), output_grads, 2, all_samples=False)
        assert relative_error(actual, expected) < 1e-6


def test_bfloat16_goes_through_patches():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, 3)
    x, output_grads = torch.randn(4, 4, 9, 9).bfloat16(), torch.randn(4, 5, 7, 7).bfloat16()
    assert not prefers_grouped(LayerGradient(conv, x, output_grads, 1))
    expected = looped(conv.double(), x.double(), output_grads.double(), 2)
    actual = gathered(conv.float(), x, output_grads, 2, all_samples=False)
    # accumulated in float32: bfloat16 products are exact there
    assert relative_error(actual, expected) < 1e-6


def test_few_positions_and_many_channels_go_through_patches():
    conv = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(2, 64, 8, 8)
    assert not prefers_grouped(LayerGradient(conv, x, x, 1))
    assert prefers_grouped(LayerGradient(conv, x, x, 2))
    assert not prefers_grouped(LayerGradient(nn.Conv2d(4, 4, 3, groups=2), x, x, 2))
    assert not prefers_grouped(LayerGradient(nn.Conv3d(1, 1, 1), x[:, None], x[:, None], 2))
    assert not prefers_grouped(LayerGradient(conv, x.double(), x.double(), 2))


@pytest.mark.parametrize("all_samples", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_workspace_grows_with_neither_size_nor_timesteps(all_samples, dtype):
    """The largest tensor of a layer's backward, for a large weight and for many rows."""
    from dtrak.runs.measure import TensorMeter

    largest = {}
    for channels, rows_per_sample in ((64, 1), (64, 12), (256, 1)):
        conv = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype)
        x = torch.randn(4 * rows_per_sample, channels, 8, 8, dtype=dtype)
        with TensorMeter(known=[x, conv.weight, conv.bias]) as meter:
            for part in weight_grads(
                LayerGradient(conv, x, x, rows_per_sample), all_samples=all_samples
            ):
                del part
        # besides a rearranged copy of the input
        largest[channels, rows_per_sample] = meter.largest_bytes, x.numel() * x.element_size()
    workspace = weight_gradient_module.WORKSPACE_BYTES["cpu"]
    gradient = 4 * 256 * 256 * 9 * dtype.itemsize
    assert gradient > 3 * workspace
    for size, copied in largest.values():
        assert size <= max(1.1 * workspace, 2 * copied)
