"""The equivalence that makes everything testable, and every refusal of the sketcher."""

import copy

import pytest
import torch
from numerics import relative_error
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from dtrak_kernels import GradientSketcher, Projection, project
from dtrak_kernels.gradients import weight as weight_gradient_module

EXACT = Projection("none", 0)
PROJECTIONS = [
    EXACT,
    Projection("rademacher", 200, seed=3),
    Projection("normal", 64, seed=3),
    Projection("sjlt", 1000, seed=3),
    Projection("kronecker", 1000, seed=3, factor_dim=6),
]


def small_unet(**changes) -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "resnet_time_scale_shift": "scale_shift",
    }
    model = diffusers.UNet2DModel(**(settings | changes)).double().eval()
    # fused attention is not exact in float64 on a CPU, so both sides use the plain one
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    return model


def true_gradients(model, f, rows, rows_per_sample, names=None):
    """``[B, P]`` by vmap(grad); ``f(model, *rows of one sample)`` gives the scalars."""
    parameters = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if names is None or name in names
    }

    def of_sample(parameters, *sample):
        return f(lambda *inputs: functional_call(model, parameters, inputs), *sample).sum()

    split = [x.unflatten(0, (-1, rows_per_sample)) for x in rows]
    grads = vmap(grad(of_sample), in_dims=(None, *[0] * len(rows)))(parameters, *split)
    return torch.cat([grads[name].flatten(1) for name in parameters], dim=1)


def looped_gradients(model, f, rows, rows_per_sample):
    """``[B, P]`` by one backward per sample: an oracle that shares nothing with vmap."""
    result = []
    for sample in zip(*[x.split(rows_per_sample) for x in rows], strict=True):
        model.zero_grad()
        f(model, *sample).sum().backward()
        result.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                    for p in model.parameters()
                ]
            )
        )
    model.zero_grad(set_to_none=True)
    return torch.stack(result)


def unet_output(model, x, t):
    return model(x, t).sample.square().flatten(1).mean(1)


def unet_rows(samples, rows_per_sample):
    torch.manual_seed(1)
    x = torch.randn(samples * rows_per_sample, 1, 8, 8, dtype=torch.float64)
    return x, torch.arange(rows_per_sample).mul(97).repeat(samples)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_unet_features_are_projected_gradients(projection):
    model, rows = small_unet(), unet_rows(3, 2)
    sketcher = GradientSketcher(model, projection, rows_per_sample=2)
    features = sketcher.sketch(lambda: unet_output(model, *rows), 3)
    expected = project(
        true_gradients(model, unet_output, rows, 2), projection, shapes=sketcher.shapes
    )
    assert features.dtype == torch.float64
    assert relative_error(features, expected) < 1e-12


def test_unet_layer_by_layer():
    model, rows = small_unet(), unet_rows(2, 3)
    features = GradientSketcher(model, EXACT, rows_per_sample=3).sketch(
        lambda: unet_output(model, *rows), 2
    )
    expected = true_gradients(model, unet_output, rows, 3)
    assert relative_error(looped_gradients(model, unet_output, rows, 3), expected) < 1e-12
    offset = 0
    for name, parameter in model.named_parameters():
        part = slice(offset, offset + parameter.numel())
        # the keys' bias has no gradient but rounding: softmax does not see it
        scale = max(expected[:, part].norm(), 1e-4 * expected.norm())
        assert (features[:, part] - expected[:, part]).norm() < 1e-12 * scale, name
        offset += parameter.numel()


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_float32_is_as_good_as_eager(projection):
    double, rows = small_unet(), unet_rows(4, 2)
    single = copy.deepcopy(double).float()
    x = rows[0].float()
    sketcher = GradientSketcher(single, projection, rows_per_sample=2)
    features = sketcher.sketch(lambda: unet_output(single, x, rows[1]), 4)
    oracle = project(
        true_gradients(double, unet_output, rows, 2), projection, shapes=sketcher.shapes
    )
    eager = project(
        true_gradients(single, unet_output, (x, rows[1]), 2), projection, shapes=sketcher.shapes
    )
    assert features.dtype == torch.float32
    assert relative_error(features, oracle) <= max(1e-6, 2 * relative_error(eager, oracle))


class Flat(nn.Module):
    """A layer, then something nonlinear to a vector per row."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def flat_output(model, x):
    return model(x).tanh().flatten(1).cumsum(1).square().mean(1)


CONVOLUTIONS = {
    "1x1": ((6, 5, 1), {}),
    "3x3 padded": ((6, 5, 3), {"padding": 1}),
    "5x3": ((3, 4, (5, 3)), {"padding": (2, 1)}),
    "stride": ((4, 6, 3), {"stride": 2, "padding": 1}),
    "unequal stride": ((4, 6, 3), {"stride": (2, 1)}),
    "dilation": ((4, 6, 3), {"dilation": (1, 2)}),
    "same, asymmetric": ((4, 6, (4, 2)), {"padding": "same"}),
    "valid": ((4, 6, 2), {"padding": "valid"}),
    "groups": ((6, 9, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((5, 10, 3), {"groups": 5}),
    "reflect": ((4, 4, 3), {"padding": 1, "padding_mode": "reflect"}),
    "circular": ((4, 4, 3), {"padding": (1, 2), "padding_mode": "circular"}),
    "no bias": ((3, 4, 3), {"bias": False}),
    "one position": ((3, 4, (7, 9)), {}),
}


def check_module(model, x, rows_per_sample=1, projection=EXACT, output=flat_output):
    """Features of a float64 module against a loop of single-sample backwards."""
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    expected = looped_gradients(model, output, (x,), rows_per_sample)
    sketcher = GradientSketcher(model, projection, rows_per_sample=rows_per_sample)
    features = sketcher.sketch(lambda: output(model, x), len(x) // rows_per_sample)
    if projection.kind != "none":
        expected = project(expected, projection, shapes=sketcher.shapes)
    assert relative_error(features, expected) < 1e-12


@pytest.mark.sweep(2)
@pytest.mark.parametrize("workspace", [2**21, 2000], ids=["one slice", "many slices"])
@pytest.mark.parametrize(
    "projection",
    [EXACT, Projection("rademacher", 33), Projection("sjlt", 256)],
    ids=lambda p: p.kind,
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, projection, workspace, monkeypatch):
    monkeypatch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
    torch.manual_seed(2)
    arguments, options = CONVOLUTIONS[name]
    conv = nn.Conv2d(*arguments, **options)
    check_module(Flat(conv), torch.randn(6, arguments[0], 7, 9), 2, projection)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("workspace", [2**21, 100], ids=["one slice", "many slices"])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_linear(shape, workspace, projection, monkeypatch):
    monkeypatch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
    torch.manual_seed(2)
    check_module(Flat(nn.Linear(5, 140)), torch.randn(*shape), 3, projection)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.GroupNorm(2, 6), (4, 6, 3, 5)),
        (nn.GroupNorm(3, 6), (4, 6)),
        (nn.GroupNorm(3, 6, affine=False), (4, 6, 2)),
        (nn.LayerNorm(6), (4, 3, 6)),
        (nn.LayerNorm((3, 6)), (4, 2, 3, 6)),
        (nn.LayerNorm(6, bias=False), (4, 6)),
        (nn.RMSNorm(6), (4, 3, 6)),
        (nn.RMSNorm((3, 6), eps=0.1), (4, 2, 3, 6)),
        (nn.RMSNorm(6, elementwise_affine=False), (4, 6)),
        # the fallback, one sample at a time
        (nn.PReLU(6), (4, 6, 3)),
        (nn.InstanceNorm2d(6, affine=True), (4, 6, 3, 4)),
        (nn.BatchNorm2d(6).eval(), (4, 6, 3, 4)),
        (nn.Bilinear(4, 4, 3), (4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("projection", [EXACT, Projection("sjlt", 256)], ids=lambda p: p.kind)
def test_other_layers(layer, shape, projection):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(shape[-1], shape[-1])
            self.layer = copy.deepcopy(layer)

        def forward(self, x):
            x = self.first(x)
            return self.layer(x, x) if isinstance(self.layer, nn.Bilinear) else self.layer(x)

    model = Model()
    model.layer.train(layer.training)
    check_module(model, torch.randn(*shape), 2, projection)


class Scaled(nn.Module):
    """Owns a parameter and a child, and takes a keyword."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.inner = nn.Linear(5, 5)

    def forward(self, x, *, shift):
        return self.inner(x * self.scale + shift).sigmoid()


def test_a_parameter_of_a_compound_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Scaled(), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.block(x, shift=x.mean(1, keepdim=True)))

    torch.manual_seed(2)
    check_module(Model(), torch.randn(6, 5), 2)


def test_modules_used_twice_and_shared_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.other = nn.Linear(5, 5), nn.Linear(5, 5)
            self.other.weight = self.twice.weight

        def forward(self, x):
            return self.other(self.twice(self.twice(x).tanh()).tanh())

    torch.manual_seed(2)
    model = Model()
    check_module(model, torch.randn(6, 5), 2)


def test_unused_parameters_have_zero_gradient():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.ignored = (nn.Linear(5, 5) for _ in range(3))

        def forward(self, x):
            self.ignored(x)
            return self.used(x)

    check_module(Model(), torch.randn(4, 5))


def test_a_path_that_does_not_depend_on_the_input():
    """Like a time embedding: with frozen weights nothing upstream requires a gradient."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.data = nn.Linear(1, 5), nn.Linear(5, 5)

        def forward(self, x):
            return self.data(x) * self.time(torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None])

    model = Model().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    features = GradientSketcher(model, EXACT, rows_per_sample=4).sketch(
        lambda: flat_output(model, x), 1
    )
    expected = looped_gradients(model, flat_output, (x,), 4)
    assert relative_error(features, expected) < 1e-12


def test_inplace_activations_after_a_layer():
    model = Flat(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    check_module(model, torch.randn(4, 5))
    # a layer that is recomputed is compared with what it gave, not with what became of it
    check_module(Flat(Alias(), nn.ReLU(inplace=True), nn.Linear(5, 4)), torch.randn(4, 5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x):
            return checkpoint(self.second, self.first(x).tanh(), use_reentrant=reentrant)

    check_module(Model(), torch.randn(4, 5), 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_statistics_of_a_group_norm_cost_no_pass(reentrant, monkeypatch):
    """Autograd's are taken, but not where that would run a checkpoint's forward again."""
    runs, made, made_by = [], [], torch.native_group_norm

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(6, 6, 3), nn.GroupNorm(2, 6)

        def forward(self, x):
            runs.append(len(x))
            return self.norm(self.conv(x)).tanh()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x):
            return checkpoint(self.second, self.first(x), use_reentrant=reentrant)

    def counted(x, *rest):
        made.append(x.dtype)
        return made_by(x, *rest)

    monkeypatch.setattr(torch, "native_group_norm", counted)
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 6, 9)
    sketcher = GradientSketcher(model, Projection("sjlt", 256))
    # its rows are checked
    sketcher.sketch(lambda: flat_output(model, x), 4)
    runs.clear(), made.clear()
    features = sketcher.sketch(lambda: flat_output(model, x), 4)
    # the first block, the second, and the second again in the backward
    assert runs == [4, 4, 4]
    # a re-entrant checkpoint runs again without hooks on what is saved
    assert len(made) == (0 if reentrant else 1)
    wide, wide_x = model.double(), x.double()
    expected = GradientSketcher(wide, Projection("sjlt", 256)).sketch(
        lambda: flat_output(wide, wide_x), 4
    )
    assert relative_error(features.double(), expected) < 1e-5
    check_module(Model(), torch.randn(4, 6, 9), 2)


def test_group_norms_in_half_precision_are_summed_in_float32():
    """Autograd's statistics of 16-bit inputs are not taken for those of float32."""
    torch.manual_seed(0)
    first, norm = nn.Conv1d(4, 6, 1), nn.GroupNorm(2, 6)
    model = nn.Sequential(first, norm).bfloat16()
    x, weights = torch.randn(3, 4, 50).bfloat16(), torch.randn(3, 6, 50).bfloat16()
    # autograd has statistics where the input needs a gradient
    x.requires_grad_()
    sketcher = GradientSketcher(model, EXACT, parameters=["1.weight", "1.bias"])
    features = sketcher.sketch(lambda: (model(x).float() * weights.float()).sum((1, 2)), 3)
    # the same 16-bit input, normalised in float64
    normalised = nn.functional.group_norm(first(x).detach().double(), 2, eps=norm.eps)
    expected = torch.stack([weights.double() * normalised, weights.double()], 1).sum(3).flatten(1)
    assert relative_error(features.double(), expected) < 1e-6


def test_checkpointing_keeps_no_layer_inputs():
    """Inputs are kept as autograd keeps activations: dropped by a checkpoint, made again."""
    from dtrak.runs.measure import TensorMeter

    class Model(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.checkpointed = checkpointed
            self.blocks = nn.ModuleList(
                nn.Sequential(*(nn.Linear(16, 16) for _ in range(8))) for _ in range(4)
            )

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            return x

    x, peaks, features = torch.randn(4, 500, 16), {}, {}
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Model(checkpointed)
        sketcher = GradientSketcher(model, Projection("sjlt", 256))
        with TensorMeter(known=[x, *model.state_dict().values()]) as meter:
            features[checkpointed] = sketcher.sketch(lambda m=model: flat_output(m, x), 4)
        peaks[checkpointed] = meter.peak_bytes
    assert torch.equal(features[True], features[False])
    # 32 layer inputs alive at once, or those of one block and one per block
    assert peaks[True] < 0.6 * peaks[False]


def test_the_same_features_whatever_the_batch():
    model, rows = small_unet(), unet_rows(4, 2)
    sketcher = GradientSketcher(model, Projection("sjlt", 512), rows_per_sample=2)
    whole = sketcher.sketch(lambda: unet_output(model, *rows), 4)
    parts = [
        sketcher.sketch(lambda x=x, t=t: unet_output(model, x, t), 1)
        for x, t in zip(*[r.split(2) for r in rows], strict=True)
    ]
    assert relative_error(torch.cat(parts), whole) < 1e-13


def test_timesteps_can_come_in_several_forwards():
    model, (x, t) = small_unet(), unet_rows(2, 2)
    sketcher = GradientSketcher(model, EXACT)
    with sketcher.batch(2) as features:
        for step in range(2):
            unet_output(model, x[step::2], t[step::2]).sum().backward()
    whole = GradientSketcher(model, EXACT, rows_per_sample=2).sketch(
        lambda: unet_output(model, x, t), 2
    )
    assert relative_error(features, whole) < 1e-12


def test_parameters_by_name_and_by_predicate():
    model, rows = small_unet(), unet_rows(2, 1)
    names = ["conv_in.weight", "mid_block.resnets.0.conv1.bias", "conv_norm_out.weight"]
    expected = true_gradients(model, unet_output, rows, 1, names)
    for choice in (names, lambda name, parameter: name in names):
        sketcher = GradientSketcher(model, EXACT, parameters=choice)
        assert sketcher.parameter_names == names
        features = sketcher.sketch(lambda: unet_output(model, *rows), 2)
        assert relative_error(features, expected) < 1e-12


def test_the_model_is_left_as_it_was():
    model, rows = small_unet(), unet_rows(2, 1)
    model.conv_in.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    sketcher = GradientSketcher(model, Projection("sjlt", 256))
    assert "conv_in.weight" not in sketcher.parameter_names
    sketcher.sketch(lambda: unet_output(model, *rows), 2)
    with pytest.raises(ZeroDivisionError), sketcher.batch(2):
        1 / 0  # noqa: B018
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_empty_batch():
    model = small_unet()
    sketcher = GradientSketcher(model, Projection("sjlt", 256))
    assert sketcher.sketch(lambda: torch.zeros(0, dtype=torch.float64), 0).shape == (0, 256)


def test_no_tensor_as_large_as_a_gradient_is_made():
    from dtrak.runs.measure import TensorMeter

    model = small_unet(block_out_channels=(32, 64), norm_num_groups=8).float()
    x, t = unet_rows(4, 1)
    sketcher = GradientSketcher(model, Projection("sjlt", 2048))
    with TensorMeter(known=model.state_dict().values()) as meter:
        sketcher.sketch(lambda: unet_output(model, x.float(), t), 4)
    assert meter.largest_bytes < 4 * 4 * sketcher.grad_dim / 4


def model_with(layer, x=None):
    model = Flat(nn.Linear(5, 5), layer).double()
    return model, torch.randn(4, 5, dtype=torch.float64) if x is None else x


def test_refuses_batch_normalisation():
    model, _ = model_with(nn.BatchNorm1d(5))
    with pytest.raises(ValueError, match=r"'layers.1' \(BatchNorm1d\) normalises over the batch"):
        GradientSketcher(model, EXACT)
    model, _ = model_with(nn.BatchNorm1d(5, track_running_stats=False).eval())
    with pytest.raises(ValueError, match="normalises over the batch"):
        GradientSketcher(model, EXACT)


def test_refuses_a_compiled_model():
    compiled = torch.compile(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must not be compiled"):
        GradientSketcher(compiled, EXACT)


def test_refuses_a_scripted_layer():
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="must not be scripted, got '1' that is"):
        GradientSketcher(model, EXACT)
    x = torch.randn(4, 3)
    sketcher = GradientSketcher(model, EXACT, parameters=["0.weight"])
    assert sketcher.sketch(lambda: model(x).sum(1), 4).shape == (4, 9)


def test_refuses_unknown_parameters():
    with pytest.raises(ValueError, match=r"got 'conv_in.weigth'; the closest is 'conv_in.weight'"):
        GradientSketcher(small_unet(), EXACT, parameters=["conv_in.weigth"])
    with pytest.raises(ValueError, match="at least one parameter"):
        GradientSketcher(small_unet(), EXACT, parameters=lambda name, parameter: False)
    with pytest.raises(ValueError, match="rows_per_sample must be at least 1, got 0"):
        GradientSketcher(small_unet(), EXACT, rows_per_sample=0)


def test_refuses_another_number_of_rows():
    model, x = model_with(nn.Identity())
    with pytest.raises(RuntimeError, match=r"'layers.0' \(Linear\) must see and return 6 rows"):
        GradientSketcher(model, EXACT, rows_per_sample=2).sketch(lambda: flat_output(model, x), 3)


def test_refuses_outputs_of_another_shape():
    model, x = model_with(nn.Identity())
    with pytest.raises(ValueError, match=r"one scalar per row, \[4\], got \[4, 5\]"):
        GradientSketcher(model, EXACT).sketch(lambda: model(x), 4)


def test_refuses_inputs_changed_in_place():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            x = self.first(x) * 1
            y = self.second(x)
            x.add_(1)
            return y

    model = Model().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"input of module 'second' \(Linear\) was changed in place"
    ):
        GradientSketcher(model, EXACT).sketch(lambda: flat_output(model, x), 4)


def test_refuses_functional_use():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x):
            return self.inner(x) @ self.inner.weight

    model = Model().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"parameter 'inner.weight' is used outside the forward"):
        GradientSketcher(model, EXACT).sketch(lambda: flat_output(model, x), 4)
    assert model.inner.weight.grad is None


def test_gradients_of_the_parameters_are_left_alone():
    model = nn.Linear(5, 5).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    model.weight.grad = kept = torch.ones(5, 5, dtype=torch.float64)
    GradientSketcher(model, EXACT).sketch(lambda: flat_output(model, x), 4)
    assert model.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model.bias.grad is None


def test_refuses_modules_that_return_no_tensor():
    class Hidden:
        def __init__(self, x):
            self.x = x

    model, x = model_with(Weighted(lambda x, w: Hidden(x * w)))
    with pytest.raises(
        RuntimeError, match=r"'layers.1' \(Weighted\) must return tensors, .* got Hidden"
    ):
        GradientSketcher(model, EXACT).sketch(lambda: flat_output(lambda x: model(x).x, x), 4)


def test_refuses_layers_that_ran_without_gradient():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            with torch.no_grad():
                x = self.first(x)
            return self.second(x)

    model = Model().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="module 'first' ran without gradient"):
        GradientSketcher(model, EXACT).sketch(lambda: flat_output(model, x), 4)


class Weighted(nn.Module):
    """A parameter of its own and some function of it."""

    def __init__(self, function, dtype=None):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(5, dtype=dtype)), function

    def forward(self, x):
        return self.function(x, self.weight)


def test_refuses_modules_that_cannot_be_recomputed():
    for function, message in (
        (
            lambda x, w: (x.mul_(2) * w).tanh(),
            r"'layers.1' \(Weighted\) changes its input in place",
        ),
        (
            lambda x, w: nn.functional.dropout(x * w, 0.5),
            "gives another output when it is recomputed",
        ),
        (lambda x, w: x * w - (x * w).mean(0), "gives another output when it is recomputed"),
    ):
        model, x = model_with(Weighted(function))
        with pytest.raises(RuntimeError, match=message):
            GradientSketcher(model, EXACT).sketch(lambda m=model, x=x: flat_output(m, x), 4)


def test_refuses_complex_parameters():
    model = Flat(Weighted(lambda x, w: (x * w).real, torch.complex64))
    with pytest.raises(ValueError, match=r"got 'layers.0.weight' of torch\.complex64"):
        GradientSketcher(model, EXACT)


def test_a_weight_of_a_parent_and_its_child():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(5, 5)
            self.weight = self.child.weight

        def forward(self, x):
            return self.child(x).tanh() @ self.weight

    torch.manual_seed(2)
    check_module(Model(), torch.randn(6, 5), 2)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_mixed_precision_parameters(projection):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5).double()

        def forward(self, x):
            return self.second(self.first(x).double())

    torch.manual_seed(2)
    model, x = Model(), torch.randn(4, 5)
    sketcher = GradientSketcher(model, projection)
    features = sketcher.sketch(lambda: flat_output(model, x), 4)
    expected = project(
        looped_gradients(model, flat_output, (x,), 1), projection, shapes=sketcher.shapes
    )
    assert relative_error(features, expected) < 1e-6


def test_refuses_dropout_in_a_recomputed_module():
    class Dropped(Scaled):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x, shift=0), 0.0)

    block = Dropped()
    block.drop = nn.Dropout(0.5)
    model, x = model_with(block)
    with pytest.raises(RuntimeError, match=r"'layers.1' \(Dropped\) has active dropout in 'drop'"):
        GradientSketcher(model, EXACT).sketch(lambda: flat_output(model, x), 4)


def test_refuses_a_second_open_batch_and_a_late_backward():
    model, x = model_with(nn.Identity())
    sketcher = GradientSketcher(model, EXACT)
    with sketcher.batch(4):
        with pytest.raises(RuntimeError, match="open already"), sketcher.batch(4):
            pass
        f = flat_output(model, x).sum()
    with pytest.raises(RuntimeError, match="inside the batch its forward ran in"):
        f.backward()


def test_views_changed_in_place():
    """A Linear of three dimensions returns a view, whose history changes with it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x):
            y = self.layers[1](self.layers[0](x))
            y[:, 0].mul_(2)
            return self.layers[2](y.relu_())

    torch.manual_seed(2)
    check_module(Model(), torch.randn(4, 3, 5), 2)
    check_module(
        Flat(nn.Linear(5, 5), nn.Linear(5, 6), nn.ReLU(inplace=True)), torch.randn(4, 3, 5)
    )


def test_hooks_that_change_an_output():
    torch.manual_seed(2)
    model = Flat(nn.Linear(5, 5), nn.Linear(5, 4))
    model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    model.layers[1].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    check_module(model, torch.randn(4, 5), 2)


def test_a_forward_of_an_instance():
    """As offloading and other patches put it there: used, and put back whatever happens."""
    torch.manual_seed(2)
    model = Flat(nn.Linear(5, 5), nn.Linear(5, 4))
    first = model.layers[0]
    plain = first.forward

    def doubled(x):
        return 2 * plain(x)

    first.forward = doubled
    check_module(model, torch.randn(4, 5), 2)
    sketcher = GradientSketcher(model, EXACT)
    with sketcher.batch(4):
        assert first.forward is not doubled
    with pytest.raises(ZeroDivisionError), sketcher.batch(4):
        1 / 0  # noqa: B018
    assert first.forward is doubled
    assert "forward" not in vars(model.layers[1])


def test_a_forward_called_without_its_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.second.forward(self.first(x).tanh())

    torch.manual_seed(2)
    check_module(Model(), torch.randn(4, 5), 2)


def test_a_forward_that_fails_leaves_its_parameters_trainable():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x):
            with pytest.raises(RuntimeError):
                self.layer(x[:, :3])
            assert self.layer.weight.requires_grad
            return self.layer(x)

    torch.manual_seed(2)
    check_module(Model(), torch.randn(4, 5), 2)


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(5))
        self.b = self.a

    def forward(self, x):
        return (x * self.a).tanh() * self.b


@pytest.mark.parametrize("kind", ["fallback", "rule"])
def test_one_parameter_under_two_names(kind):
    torch.manual_seed(2)
    layer = Alias() if kind == "fallback" else nn.LayerNorm(5)
    if kind == "rule":
        layer.bias = layer.weight
    model, x = Flat(nn.Linear(5, 5), layer), torch.randn(4, 5)
    check_module(model, x, 2)
    x = x.double()
    sketcher = GradientSketcher(model, EXACT, rows_per_sample=2, norms=True)
    features = sketcher.sketch(lambda: flat_output(model, x), 2)
    assert relative_error(sketcher.grad_norms, features.norm(dim=1)) < 1e-12


def test_a_module_that_calls_itself():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(5))

        def forward(self, x, depth=2):
            return x * self.scale if depth == 0 else self(x * self.scale, depth - 1).tanh()

    torch.manual_seed(2)
    check_module(Flat(nn.Linear(5, 5), Recursive()), torch.randn(4, 5), 2)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_a_backward_inside_autocast(projection):
    torch.manual_seed(2)
    model, x = Flat(nn.Linear(9, 30), nn.Linear(30, 8)), torch.randn(4, 3, 9)
    sketcher = GradientSketcher(model, projection, norms=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside, norms = sketcher.sketch(lambda: flat_output(model, x), 4), sketcher.grad_norms
    with sketcher.batch(4) as outside:
        with torch.autocast("cpu", torch.bfloat16):
            f = flat_output(model, x).sum()
        f.backward()
    assert torch.equal(inside, outside)
    assert torch.equal(norms, sketcher.grad_norms)


def test_norms_under_checkpointing_hold_no_gradient():
    from dtrak.runs.measure import TensorMeter

    layers = [nn.Linear(64, 64) for _ in range(4)]

    def run(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    model, x = nn.ModuleList(layers), torch.randn(8, 64)
    sketcher = GradientSketcher(model, Projection("kronecker", 256), norms=True)
    sketcher.sketch(lambda: flat_output(run, x), 8)
    with TensorMeter(known=[x, *model.state_dict().values()]) as meter:
        sketcher.sketch(lambda: flat_output(run, x), 8)
    assert meter.peak_bytes < 4 * 8 * sketcher.grad_dim
    exact = looped_gradients(model, lambda _, x: flat_output(run, x), (x,), 1)
    assert relative_error(sketcher.grad_norms, exact.norm(dim=1)) < 1e-5


@pytest.mark.parametrize("workspace", [2**21, 100], ids=["at the end", "several times"])
@pytest.mark.parametrize("kind", ["sjlt", "kronecker"])
def test_vectors_wait_within_the_workspace(kind, workspace, monkeypatch):
    """Biases and norm weights are sketched together, whatever batch was abandoned before."""
    monkeypatch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
    torch.manual_seed(2)
    model = Flat(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 300), nn.PReLU(300)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    sketcher = GradientSketcher(model, Projection(kind, 256, seed=3), rows_per_sample=2)
    expected = project(
        looped_gradients(model, flat_output, (x,), 2), sketcher.projection, shapes=sketcher.shapes
    )

    def abandoned():
        flat_output(model, x).sum().backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sketcher.sketch(abandoned, 2)
    for _ in range(2):
        features = sketcher.sketch(lambda: flat_output(model, x), 2)
        assert relative_error(features, expected) < 1e-13
    with sketcher.batch(2) as twice:
        for _ in range(2):
            flat_output(model, x).sum().backward()
    assert relative_error(twice, 2 * expected) < 1e-13


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_an_empty_batch_of_every_layer(projection):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2))
    sketcher = GradientSketcher(model, projection, norms=True)
    x = torch.randn(0, 2, 4, 4)
    assert sketcher.sketch(lambda: model(x).sum(1), 0).shape == (0, sketcher.proj_dim)
    with sketcher.batch(0) as features:
        model(x).sum().backward()
    assert len(features) == len(sketcher.grad_norms) == 0


def test_a_forward_that_skips_its_parameters():
    class Skipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5))

        def forward(self, x):
            return x

    check_module(Flat(nn.Linear(5, 5), Skipped(), nn.Linear(5, 2)), torch.randn(4, 5))


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_inputs_inside_a_moat(projection):
    """An unmasked read of what lies round the input would drag NaN into the features."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, stride=2), nn.Conv2d(5, 4, 3, padding=1))
    parent = torch.full((8, 7, 12, 13), float("nan"))
    x = parent[2:6, 2:5, 3:10, 4:12]
    x.copy_(torch.randn(x.shape))
    sketcher = GradientSketcher(model, projection)
    features = sketcher.sketch(lambda: flat_output(model, x), 4)
    assert torch.equal(features, sketcher.sketch(lambda: flat_output(model, x.contiguous()), 4))
    assert torch.isfinite(features).all()


def test_misuse_gets_one_clear_line():
    model, x = model_with(nn.Identity())
    with pytest.raises(ValueError, match="implementation must be 'torch' or 'triton', got 'cuda'"):
        GradientSketcher(model, EXACT, implementation="cuda")
    with pytest.raises(ValueError, match="must be 'torch' or None for kind 'none', got 'triton'"):
        GradientSketcher(model, EXACT, implementation="triton")
    with pytest.raises(ValueError, match="several names or a predicate, got 'layers'"):
        GradientSketcher(model, EXACT, parameters="layers")
    compiled = nn.Module()
    compiled.inner = torch.compile(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 'inner' that is"):
        GradientSketcher(compiled, EXACT)
    sketcher = GradientSketcher(model, EXACT)
    with pytest.raises(ValueError, match="num_samples must be an int of at least 0, got -1"):
        sketcher.sketch(lambda: flat_output(model, x), -1)
    with pytest.raises(ValueError, match="outputs must return a tensor, got NoneType"):
        sketcher.sketch(lambda: None, 4)
    with pytest.raises(RuntimeError, match="got a result without gradient"):
        sketcher.sketch(lambda: flat_output(model, x).detach(), 4)
