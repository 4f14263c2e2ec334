"""The fused gradient-and-sketch kernel computes what the torch path and the definition compute."""

import itertools
import math
from functools import lru_cache

import pytest
import torch
from numerics import assert_as_good_as, relative_error
from test_sketcher import CONVOLUTIONS, Flat, flat_output, looped_gradients, small_unet, unet_output
from torch import nn

from dtrak_kernels import GradientSketcher, Projection, project
from dtrak_kernels.gradients.weight import LayerGradient, weight_grads
from dtrak_kernels.sjlt import triton as sketch_kernel
from dtrak_kernels.sjlt.config import SketchConfig
from dtrak_kernels.sjlt.reference import sjlt_matrix
from dtrak_kernels.sjlt.torch import ParameterSketch
from dtrak_kernels.sjlt.triton import launch_sketch

# a parameter before the weight, so that its offset matters
OFFSET = 37
SEED = 2**40 + 3
DTYPES = [
    torch.float32,
    torch.float16,
    # the interpreter's bfloat16 products are silently wrong
    pytest.param(torch.bfloat16, marks=pytest.mark.compiled),
]


def moated(x, order=None):
    """The same values inside a NaN-filled parent whose memory has dimensions in this order."""
    order = order or range(x.ndim)
    parent = x.new_full([x.shape[axis] + 6 for axis in order], float("nan"))
    inverse = [list(order).index(axis) for axis in range(x.ndim)]
    view = parent.permute(inverse)[tuple(slice(3, 3 + size) for size in x.shape)]
    view.copy_(x)
    return view


def layer_batch(module, shape, dtype, device, order=None):
    """Input and output gradient of a layer in a NaN moat, and the layer."""
    torch.manual_seed(2)
    x = torch.randn(*shape)
    grads = torch.randn_like(module(x))
    module = module.to(device)
    x, grads = (moated(a.to(device, dtype), order) for a in (x, grads))
    return module, x, grads


def true_gradients(module, x, output_grads, rows_per_sample):
    """``[B, P]`` float64 of the weight by one backward per sample, on the CPU."""
    weight = module.weight.detach().cpu().double().requires_grad_()
    result = []
    for rows in zip(
        x.cpu().double().split(rows_per_sample),
        output_grads.cpu().double().split(rows_per_sample),
        strict=True,
    ):
        output = torch.func.functional_call(
            module, {"weight": weight, "bias": torch.zeros(len(weight)).double()}, rows[0]
        )
        result.append(torch.autograd.grad(output, weight, rows[1])[0].flatten())
    return torch.stack(result)


def torch_path(module, x, output_grads, sketch, rows_per_sample):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(len(x) // rows_per_sample, sketch.proj_dim, dtype=wide, device=x.device)
    layer = LayerGradient(module, x, output_grads, rows_per_sample)
    for part in weight_grads(layer, all_samples=False, row_multiple=sketch.tile[0]):
        sketch.add_matrix(part.grads, out[part.samples], part.rows.start)
    return out


def sketch_of(module, proj_dim):
    return ParameterSketch(tuple(module.weight.shape), OFFSET, proj_dim, SEED)


def launch(module, x, output_grads, proj_dim, rows_per_sample=1, config=None):
    """Features that the kernel adds to a nonzero ``out`` inside a border it must not touch."""
    samples = len(x) // rows_per_sample
    parent = torch.full((samples + 2, proj_dim + 24), 0.25, device=x.device)
    out = parent[1:-1, 12:-12]
    result = launch_sketch(
        module, x, output_grads, sketch_of(module, proj_dim), out, rows_per_sample, config
    )
    assert result is out
    features = out - 0.25
    out.fill_(0.25)
    assert torch.equal(parent, torch.full_like(parent, 0.25)), "wrote outside of out"
    return features


@lru_cache(maxsize=32)
def definition(shape, proj_dim):
    """The matrix of a weight, which takes longer than what it judges."""
    return sjlt_matrix([(OFFSET,), shape], proj_dim, SEED)[OFFSET:]


def check_against_the_definition(module, x, output_grads, proj_dim, rows_per_sample, config=None):
    matrix = definition(tuple(module.weight.shape), proj_dim)
    eager = torch_path(module, x, output_grads, sketch_of(module, proj_dim), rows_per_sample)
    assert_as_good_as(
        launch(module, x, output_grads, proj_dim, rows_per_sample, config),
        eager=eager,
        oracle=true_gradients(module, x, output_grads, rows_per_sample) @ matrix,
    )


@pytest.mark.sweep
@pytest.mark.parametrize("order", [None, (0, 2, 3, 1)], ids=["NCHW", "channels last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, order, device):
    arguments, options = CONVOLUTIONS[name]
    conv = nn.Conv2d(*arguments, **options)
    conv, x, grads = layer_batch(conv, (2, arguments[0], 7, 9), torch.float32, device, order)
    # two samples, or two rows of one
    check_against_the_definition(conv, x, grads, 700, 2 if order else 1)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "conv, proj_dim",
    [
        # three channels, 27 columns, two blocks of which the second reaches into the first
        (nn.Conv2d(3, 20, 3, padding=1), 1500),
        # one tap per tile of columns
        (nn.Conv2d(32, 17, 3, stride=2, padding=1), 1024),
        (nn.Conv2d(16, 33, (1, 2), padding="same", dilation=2), 256),
        # tiles that straddle taps, groups of 2 channels
        (nn.Conv2d(10, 35, 3, groups=5), 300),
    ],
    ids=["three channels", "one tap", "one tap, same", "groups"],
)
def test_convolutions_of_many_tiles(conv, proj_dim, dtype, device):
    shape = (2, conv.in_channels, 5, 6)
    conv, x, grads = layer_batch(conv, shape, dtype, device, (0, 2, 3, 1))
    check_against_the_definition(conv, x, grads, proj_dim, 2)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, rows_per_sample, proj_dim",
    [
        # 3 x 3 tiles in one block; in two of which the second reaches into the first; in three
        ((3, 40), 3, 512),
        ((2, 7, 40), 1, 1000),
        ((6, 2, 3, 40), 2, 1536),
        ((2, 70, 40), 2, 256),
    ],
    ids=str,
)
def test_linear(shape, rows_per_sample, proj_dim, dtype, device):
    linear, x, grads = layer_batch(nn.Linear(40, 70), shape, dtype, device)
    check_against_the_definition(linear, x, grads, proj_dim, rows_per_sample)


# (O, I), K: every number of halvings of a full tile, and thin tiles
SIZES = [
    ((150, 300), 40_000),
    ((150, 300), 16_384),
    ((150, 200), 8_192),
    ((130, 200), 5_000),
    ((130, 70), 2_048),
    ((200, 5), 30_000),
    ((3, 200), 30_000),
]


@pytest.mark.sweep
@pytest.mark.parametrize("is_rolled", [True, False], ids=["sums", "loads"])
@pytest.mark.parametrize("shape, proj_dim", SIZES, ids=str)
def test_every_tile_and_both_ways_of_shifting(shape, proj_dim, is_rolled, device):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear, x, grads = layer_batch(linear, (4, 9, shape[1]), torch.float32, device)
    sketch = sketch_of(linear, proj_dim)
    config = SketchConfig(block_t=16, num_stages=1, is_rolled=is_rolled)
    assert_as_good_as(
        launch(linear, x, grads, proj_dim, 2, config),
        eager=torch_path(linear, x, grads, sketch, 2),
        oracle=torch_path(linear.double(), x.double(), grads.double(), sketch, 2),
    )


@pytest.mark.parametrize("order", [None, (0, 2, 3, 1)], ids=["NCHW", "channels last"])
def test_images_reach_the_kernel_channels_last(order, device, monkeypatch):
    """Others are copied, and only they: what is read is what was given where channels are last."""
    launches = []
    monkeypatch.setattr(sketch_kernel, "launch", lambda *_, **named: launches.append(named))
    conv = nn.Conv2d(4, 6, 3, padding=1)
    conv, x, grads = layer_batch(conv, (2, 4, 5, 7), torch.float32, device, order)
    launch_sketch(conv, x, grads, sketch_of(conv, 256), torch.zeros(2, 256, device=device))
    assert launches
    for named in launches:
        assert named["stride_xc"] == named["stride_dc"] == 1
        is_given = named["x_ptr"].data_ptr() == x.data_ptr()
        assert is_given == (named["d_ptr"].data_ptr() == grads.data_ptr()) == (order is not None)


def test_offsets_of_64_bits(device, monkeypatch):
    monkeypatch.setattr(sketch_kernel, "MAX_NARROW", 0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2)
    conv, x, grads = layer_batch(conv, (4, 4, 7, 9), torch.float32, device)
    check_against_the_definition(conv, x, grads, 256, 2)


def test_the_largest_offset_of_a_sample():
    x = torch.empty(6, 3, 5, 7, device="meta").to(memory_format=torch.channels_last)
    assert sketch_kernel._largest_offset(x, 2) == 2 * 3 * 5 * 7 - 1
    assert sketch_kernel._largest_offset(x[:, :2, :, :-1], 1) == 3 * 5 * 7 - 1 - 1 - 3


def test_steps_do_not_change_the_features(device):
    linear, x, grads = layer_batch(nn.Linear(40, 70), (1, 50, 40), torch.float32, device)
    results = [
        launch(linear, x, grads, 1000, 1, SketchConfig(block_t=block_t)) for block_t in (16, 32, 64)
    ]
    for one, other in itertools.pairwise(results):
        assert relative_error(one, other) < 1e-6


def test_same_bits_alone_and_in_a_batch(device):
    conv = nn.Conv2d(5, 6, 3)
    conv, x, grads = layer_batch(conv, (6, 5, 7, 9), torch.float32, device)
    whole = launch(conv, x, grads, 700, 2)
    assert torch.equal(launch(conv, x, grads, 700, 2), whole)
    parts = [launch(conv, x[r : r + 2], grads[r : r + 2], 700, 2) for r in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("shape, proj_dim", [*SIZES, ((30, 18), 300), ((70, 40), 257)], ids=str)
def test_windows_of_one_launch_do_not_overlap(shape, proj_dim, device, monkeypatch):
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: launches.append(arguments["blocks_ptr"])

    linear, x, grads = layer_batch(
        nn.Linear(shape[1], shape[0]), (1, shape[1]), torch.float32, device
    )
    monkeypatch.setattr(sketch_kernel, "_sketch_kernel", Recorder())
    sketch = sketch_of(linear, proj_dim)
    launch_sketch(linear, x, grads, sketch, torch.zeros(1, proj_dim, device=device))
    tiles, size = 0, math.prod(sketch.tile)
    for blocks in launches:
        windows = blocks[:, :1].cpu() + torch.arange(size)
        counts = torch.bincount((windows % proj_dim).flatten(), minlength=proj_dim)
        assert int(counts.max()) == 1
        tiles += int((blocks[:, 2] - blocks[:, 1]).sum())
    assert tiles == math.prod(sketch.grid)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (4, 0, 5)], ids=str)
def test_nothing_to_add(shape, device):
    x = torch.randn(*shape, device=device)
    linear = nn.Linear(5, 6).to(device)
    features = launch(linear, x, torch.empty(*shape[:-1], 6, device=device), 256, 2)
    assert torch.equal(features, torch.zeros(shape[0] // 2, 256, device=device))


def test_an_image_smaller_than_the_padded_kernel(device):
    conv = nn.Conv2d(4, 5, 3, padding=1)
    conv, x, grads = layer_batch(conv, (2, 4, 1, 1), torch.float32, device, (0, 2, 3, 1))
    check_against_the_definition(conv, x, grads, 256, 1)


PROJECTION = Projection("sjlt", 4096, seed=3)


# slow: the layers of a U-Net are in the fast lane one by one
@pytest.mark.full
def test_unet_features(device):
    model = small_unet().float().to(device)
    torch.manual_seed(1)
    x, t = torch.randn(2, 1, 8, 8, device=device), torch.tensor([3, 90], device=device)
    features = {}
    for implementation in ("torch", "triton"):
        sketcher = GradientSketcher(
            model, PROJECTION, rows_per_sample=2, implementation=implementation
        )
        features[implementation] = sketcher.sketch(lambda: unet_output(model, x, t), 1)
    double = model.double()
    oracle = GradientSketcher(double, PROJECTION, rows_per_sample=2, implementation="torch").sketch(
        lambda: unet_output(double, x.double(), t), 1
    )
    assert_as_good_as(features["triton"], eager=features["torch"], oracle=oracle)


def test_the_sketcher_launches_the_kernel(device, monkeypatch):
    calls = []

    def launch_and_count(module, *rest, **named):
        calls.append(type(module).__name__)
        return launch_sketch(module, *rest, **named)

    monkeypatch.setattr(sketch_kernel, "launch_sketch", launch_and_count)
    torch.manual_seed(2)
    model = Flat(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 4)).to(device)
    x = torch.randn(4, 2, 4, 4, device=device)
    sketcher = GradientSketcher(model, PROJECTION, rows_per_sample=2, implementation="triton")
    features = sketcher.sketch(lambda: flat_output(model, x), 2)
    assert sorted(calls) == ["Conv2d", "Linear"]
    expected = looped_gradients(model.double().cpu(), flat_output, (x.double().cpu(),), 2)
    oracle = project(expected, PROJECTION, shapes=sketcher.shapes)
    assert relative_error(features, oracle) < 1e-6


def test_the_device_chooses(device, monkeypatch):
    calls = []
    monkeypatch.setattr(
        sketch_kernel, "launch_sketch", lambda *arguments, **_: calls.append(arguments)
    )
    model = nn.Linear(5, 4).to(device)
    x = torch.randn(2, 5, device=device)
    for implementation, expected in ((None, device.type == "cuda"), ("torch", False)):
        calls.clear()
        sketcher = GradientSketcher(model, PROJECTION, implementation=implementation)
        sketcher.sketch(lambda: flat_output(model, x), 2)
        assert bool(calls) == expected


def test_autocast_rounds_the_input_as_the_layer_does(device):
    model = nn.Linear(5, 4, bias=False).to(device)
    x, weights = torch.randn(3, 5, device=device), torch.randn(3, 4, device=device)

    def outputs():
        with torch.autocast(device.type, torch.bfloat16):
            return (model(x) * weights).sum(1)

    features = GradientSketcher(model, Projection("none", 0)).sketch(outputs, 3)
    x, weights = x.bfloat16().double(), weights.bfloat16().double()
    assert relative_error(features, torch.einsum("bo,bi->boi", weights, x).flatten(1)) < 1e-6


def test_refuses_what_it_cannot_run(device, monkeypatch):
    def sketch(model, x):
        sketcher = GradientSketcher(model, PROJECTION, implementation="triton")
        return sketcher.sketch(lambda: flat_output(model, x), len(x))

    with pytest.raises(ValueError, match="implementation must be 'torch' or 'triton', got 'cuda'"):
        GradientSketcher(nn.Linear(5, 4), PROJECTION, implementation="cuda")
    x = torch.randn(2, 5, device=device)
    with pytest.raises(TypeError, match="float32, float16 or bfloat16 for triton, got float64"):
        sketch(nn.Linear(5, 4).double().to(device), x.double())
    monkeypatch.setattr("dtrak_kernels.dense.triton.IS_INTERPRETED", False)
    with pytest.raises(ValueError, match=r"'triton' must have grads on a GPU .* got device cpu"):
        sketch(nn.Linear(5, 4), x.cpu())
    with pytest.raises(ValueError, match="must be 'torch' or None for kind 'sjlt', got 'triton'"):
        project(x, PROJECTION, shapes=[(5,)], implementation="triton")


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=pytest.mark.compiled),
        pytest.param(torch.float16, marks=pytest.mark.gpu),
        # no tensor core: minutes of scalar products
        pytest.param(torch.float32, marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [4, 16], ids=["4x4", "16x16"])
def test_layers_of_a_real_network(size, dtype, device):
    # an emulated card has fewer tiles, each as long as on a GPU
    channels = 384 if device.type == "cuda" else 128
    conv = nn.Conv2d(channels, 256, 3, padding=1)
    shape = (20, channels, size, size)
    torch.manual_seed(2)
    x, grads = (
        torch.randn(*s, device=device).to(dtype, memory_format=torch.channels_last)
        for s in (shape, (20, 256, size, size))
    )
    sketch = ParameterSketch(tuple(conv.weight.shape), OFFSET, 2**15, SEED)
    out = torch.zeros(4, 2**15, device=device)
    launch_sketch(conv, x, grads, sketch, out, 5)
    assert_as_good_as(
        out,
        eager=torch_path(conv, x, grads, sketch, 5),
        oracle=torch_path(conv, x.double(), grads.double(), sketch, 5),
    )
