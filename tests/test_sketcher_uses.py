"""Uses that are rare but real: right to rounding, or refused by name."""

import copy
import inspect
import pickle
import types

import pytest
import torch
from numerics import relative_error
from test_sketcher import EXACT, Flat, Scaled, check_module, flat_output, looped_gradients
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dtrak_kernels import GradientSketcher, Projection, project

PROJECTIONS = [EXACT, Projection("sjlt", 512, seed=3), Projection("kronecker", 512, factor_dim=3)]


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4)).double()
    return model, torch.randn(4, 5, dtype=torch.float64)


def test_hooks_of_the_caller_on_an_output():
    """What they make of a gradient is what the layer gets, whenever they were put there."""

    class Model(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.last = inner, nn.Linear(5, 4)

        def forward(self, x):
            y = self.inner(x)
            y.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
            return self.last(y.relu())

    for inner in (nn.Linear(5, 5), nn.PReLU(), nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5))):
        torch.manual_seed(2)
        check_module(Model(inner), torch.randn(4, 5))
        check_module(Model(inner), torch.randn(4, 3, 5), 2)
    model, x = two_layers()
    model[0].register_full_backward_hook(lambda m, grads, _: None)
    model[1].register_full_backward_pre_hook(lambda m, grads: (3 * grads[0],))
    check_module(model, x, 2)


def test_hooks_on_a_module_that_is_recomputed():
    """Its input and output are those between the hooks: they are not applied twice."""
    torch.manual_seed(2)
    model = Flat(nn.Linear(5, 5), nn.PReLU(5))
    model.layers[1].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model.layers[1].register_forward_hook(lambda module, args, output: output.sin())
    check_module(model, torch.randn(4, 5), 2)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_ends_in_a_recomputed_module(reentrant, norms):
    """The first to ask for what the checkpoint dropped is the fallback."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.block = nn.Sequential(nn.Linear(5, 5), nn.PReLU(5), nn.Tanh(), nn.PReLU(5))

        def forward(self, x):
            return checkpoint(self.block, self.first(x), use_reentrant=reentrant)

    torch.manual_seed(2)
    model, x = Model().double(), torch.randn(4, 5, dtype=torch.float64)
    sketcher = GradientSketcher(model, EXACT, norms=norms)
    features = sketcher.sketch(lambda: flat_output(model, x), 4)
    assert relative_error(features, looped_gradients(model, flat_output, (x,), 1)) < 1e-12
    if norms:
        assert relative_error(sketcher.grad_norms, features.norm(dim=1)) < 1e-12


class Both(nn.Module):
    """Two convolutions of one weight, side by side."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x):
        return self.first(x).sin() + 2 * self.second(x.cos())


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", ["transposed", "padding mode", "dilation"])
def test_one_weight_in_convolutions_of_other_geometry(name, swapped, projection):
    """How the gradients of one are made is not how those of the other are."""
    torch.manual_seed(2)
    wide = {"in_channels": 18, "out_channels": 1, "kernel_size": 3}
    first, second = {
        "transposed": lambda: (nn.Conv2d(6, 6, 1), nn.ConvTranspose2d(6, 6, 1)),
        "padding mode": lambda: (
            nn.Conv2d(**wide, padding=1),
            nn.Conv2d(**wide, padding=1, padding_mode="circular"),
        ),
        "dilation": lambda: (
            nn.Conv2d(**wide, padding=1),
            nn.Conv2d(**wide, padding=2, dilation=2),
        ),
    }[name]()
    layers = (second, first) if swapped else (first, second)
    check_module(Both(*layers), torch.randn(4, first.in_channels, 7, 9), 2, projection)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_a_padding_mode_that_changes_between_batches(projection):
    """As it does for images that are tiled."""
    torch.manual_seed(2)
    model = nn.Conv2d(18, 1, 3, padding=1).double()
    x = torch.randn(4, 18, 7, 9, dtype=torch.float64)
    sketcher = GradientSketcher(model, projection)
    for mode in ("zeros", "circular", "reflect"):
        model.padding_mode = mode
        features = sketcher.sketch(lambda: flat_output(model, x), 4)
        expected = looped_gradients(model, flat_output, (x,), 1)
        if projection.kind != "none":
            expected = project(expected, projection, shapes=sketcher.shapes)
        assert relative_error(features, expected) < 1e-12


def test_a_convolution_whose_inner_forward_was_replaced():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3))

    def tiled(self, x, weight, bias):
        x = nn.functional.pad(x, (1, 1, 0, 0), mode="circular")
        return nn.functional.conv2d(nn.functional.pad(x, (0, 0, 1, 1)), weight, bias)

    model[0]._conv_forward = types.MethodType(tiled, model[0])
    check_module(model, torch.randn(4, 3, 6, 7), 2)


def test_complex_outputs():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5))

        def forward(self, x):
            return torch.fft.fft(x * self.weight)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), Spectral()

        def forward(self, x):
            return self.second(self.first(x)).abs()

    torch.manual_seed(2)
    check_module(Model(), torch.randn(4, 5), 2)


def test_an_input_that_is_given_back():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return x

    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    check_module(nn.Sequential(Same(), nn.Linear(5, 3)), x)


@pytest.mark.parametrize("size", [5, 200])
@pytest.mark.parametrize("kind", ["none", "sjlt", "kronecker", "rademacher"])
def test_a_float32_layer_of_a_float64_model(kind, size):
    class Cast(nn.Module):
        """The fallback, no more exact than float32 although its output is float64."""

        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(size)), nn.Linear(size, size)

        def forward(self, x):
            return (self.inner(x.float()) * self.scale).double()

    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(size, size), Cast(), nn.Linear(size, size).double())
    x = torch.randn(4, size)
    sketcher = GradientSketcher(model, Projection(kind, 0 if kind == "none" else 512))
    features = sketcher.sketch(lambda: flat_output(model, x), 4)
    expected = looped_gradients(model, flat_output, (x,), 1)
    if kind != "none":
        expected = project(expected, sketcher.projection, shapes=sketcher.shapes)
    assert features.dtype == torch.float64
    assert relative_error(features, expected) < 1e-5


def test_parameters_without_elements_are_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.to_none, self.back = nn.Linear(5, 5), nn.Linear(5, 0), nn.Linear(0, 5)

        def forward(self, x):
            x = self.first(x)
            return x + self.back(self.to_none(x))

    torch.manual_seed(2)
    model = Model()
    check_module(model, torch.randn(4, 5), 2)
    assert GradientSketcher(model, EXACT).parameter_names == [
        "first.weight",
        "first.bias",
        "back.bias",
    ]


def test_functional_calls_with_other_parameters():
    """A teacher's gradient is not asked for, its tensors stay as they are."""
    model, x = two_layers()
    teacher = {name: p.detach().clone() for name, p in model.named_parameters()}

    def output(model, x):
        return (model(x) * torch.func.functional_call(model, teacher, (x,))).sum(1)

    check_module(model, x, 2, output=output)
    assert not any(p.requires_grad for p in teacher.values())

    def scaled(model, x):
        twice = {name: 2 * p for name, p in model.named_parameters()}
        return torch.func.functional_call(model, twice, (x,)).square().sum(1)

    with pytest.raises(RuntimeError, match=r"parameter '0\.weight' is used outside the forward"):
        GradientSketcher(model, EXACT).sketch(lambda: scaled(model, x), 4)


def test_gradients_on_the_way_to_the_outputs():
    """Guidance: a gradient with respect to the input, then one of the parameters."""
    model, x = two_layers()

    def output(model, x, **options):
        x = x.detach().requires_grad_()
        (direction,) = torch.autograd.grad(model(x).tanh().sum(), x, **options)
        return model(x + direction).square().sum(1)

    check_module(model, x, 2, output=output)
    # through the direction a gradient would reach the parameters
    with pytest.raises(RuntimeError, match=r"create_graph=True: .* module '1' \(Linear\)"):
        GradientSketcher(model, EXACT).sketch(lambda: output(model, x, create_graph=True), 4)


def test_a_backward_of_an_earlier_batch():
    model, x = two_layers()
    sketcher = GradientSketcher(model, EXACT)
    with sketcher.batch(4):
        f = flat_output(model, x).sum()
    with (
        pytest.raises(RuntimeError, match="inside the batch its forward ran in"),
        sketcher.batch(4),
    ):
        f.backward()
    expected = looped_gradients(model, flat_output, (x,), 1)
    assert relative_error(sketcher.sketch(lambda: flat_output(model, x), 4), expected) < 1e-12


@pytest.mark.parametrize("samples", [1, 4])
def test_refuses_batches_of_two_sketchers_at_once(samples):
    model, x = two_layers()
    first, second = (GradientSketcher(model, EXACT) for _ in range(2))
    with first.batch(samples) as features:
        with pytest.raises(RuntimeError, match=r"'0' \(Linear\) is watched by an open batch"):
            second.sketch(lambda: flat_output(model, x[:samples]), samples)
        flat_output(model, x[:samples]).sum().backward()
    expected = looped_gradients(model, flat_output, (x[:samples],), 1)
    assert relative_error(features, expected) < 1e-12
    again = second.sketch(lambda: flat_output(model, x[:samples]), samples)
    assert relative_error(again, expected) < 1e-12


def test_refuses_a_model_that_was_changed():
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5)), nn.Linear(5, 4), nn.Linear(4, 4))
    names = ["0.0.weight", "1.bias"]
    sketcher, x = GradientSketcher(model, EXACT, parameters=names), torch.randn(4, 5)
    # of no concern
    model[2], model[1].weight = nn.Identity(), nn.Parameter(torch.randn(4, 5))
    sketcher.sketch(lambda: flat_output(model, x), 4)
    model[0] = nn.Sequential(nn.Linear(5, 5))
    with pytest.raises(RuntimeError, match=r"'0' of the model was replaced after the sketcher"):
        sketcher.sketch(lambda: flat_output(model, x), 4)
    sketcher = GradientSketcher(model, EXACT, parameters=names)
    model[0][0] = nn.Linear(5, 5)
    with pytest.raises(RuntimeError, match=r"'0\.0' of the model was replaced"):
        sketcher.sketch(lambda: flat_output(model, x), 4)
    sketcher = GradientSketcher(model, EXACT, parameters=names)
    model[1].bias = nn.Parameter(torch.randn(4), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"'1\.bias' of the model was replaced"):
        sketcher.sketch(lambda: flat_output(model, x), 4)
    assert not model[1].bias.requires_grad
    layer = nn.Linear(5, 4)
    sketcher = GradientSketcher(layer, EXACT)
    layer.weight = nn.Parameter(torch.randn(4, 5))
    with pytest.raises(RuntimeError, match=r"^'weight' of the model was replaced"):
        sketcher.sketch(lambda: flat_output(layer, x), 4)


def test_a_forward_keeps_its_signature():
    model = nn.ModuleList([Scaled()])
    with GradientSketcher(model, EXACT).batch(2):
        assert list(inspect.signature(model[0].forward).parameters) == ["x", "shift"]


def test_refuses_forward_mode_differentiation():
    model, x = two_layers()

    def tangent(x):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(model(dual)).tangent.square().sum(1)

    with pytest.raises(RuntimeError, match=r"module '0' \(Linear\) ran inside forward-mode"):
        GradientSketcher(model, EXACT).sketch(lambda: tangent(x), 4)


def test_refuses_copies_of_a_model_inside_a_batch():
    """They would run with the original's parameters."""
    model, x = two_layers()
    sketcher = GradientSketcher(model, EXACT)
    with sketcher.batch(4), pytest.raises(RuntimeError, match="must not be copied inside a batch"):
        copy.deepcopy(model)
    sketcher.sketch(lambda: flat_output(model, x), 4)
    check_module(copy.deepcopy(model), x)
    check_module(pickle.loads(pickle.dumps(model)), x)


def test_refuses_what_no_gradient_can_come_from():
    with torch.inference_mode():
        tokens = torch.tensor([[1, 2], [0, 3]])
    model = nn.Embedding(5, 3)
    with pytest.raises(RuntimeError, match=r"module 'Embedding' \(Embedding\) was made in infer"):
        GradientSketcher(model, EXACT).sketch(lambda: flat_output(model, tokens), 2)
    with pytest.raises(ValueError, match=r"must be initialised, got '0\.weight' that waits"):
        GradientSketcher(nn.Sequential(nn.LazyLinear(4)), EXACT)
