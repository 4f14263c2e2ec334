"""Whitened features are projections of whitened gradients, by a dense oracle in float64."""

import copy

import pytest
import torch
from dense_whitening import dense_map, dense_whitened, inverse_root, second_moments
from numerics import relative_error
from test_sketcher import (
    looped_gradients,
    small_unet,
    unet_output,
    unet_rows,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dtrak_kernels import GradientSketcher, Projection, Whitening, project
from dtrak_kernels.gradients import weight as weight_module
from dtrak_kernels.gradients.whitening import fit as fit_module
from dtrak_kernels.gradients.whitening import roots as roots_module
from dtrak_kernels.gradients.whitening.definition import KINDS

EXACT = Projection("none")
PROJECTIONS = [
    EXACT,
    Projection("rademacher", 40, seed=3),
    Projection("normal", 33, seed=3),
    Projection("sjlt", 300, seed=3),
    Projection("kronecker", 300, seed=3, factor_dim=3),
]
WHITENING = [kind for kind in KINDS if kind != "none"]


class Net(nn.Module):
    """Something before the layer, so that its inputs are correlated, and nonlinear after it."""

    def __init__(self, first, layer):
        super().__init__()
        self.first, self.layer = first, layer

    def forward(self, x):
        return self.layer(self.first(x))


def output(model, x):
    y = model(x).tanh().flatten(1)
    return (y * torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)).cumsum(1).square().mean(1)


# name: (layer, shape of a row)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (5,)),
    "linear, positions": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "conv2d, one position": (lambda: nn.Conv2d(3, 5, (3, 2)), (3, 3, 2)),
    "conv2d, 1x1": (lambda: nn.Conv2d(4, 3, 1), (4, 3, 3)),
    "conv2d, stride, dilation": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=1),
        (3, 7, 6),
    ),
    "conv2d, groups": (lambda: nn.Conv2d(6, 6, 3, groups=2, padding=1), (6, 4, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 2, groups=4), (4, 4, 4)),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (3, 5, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), (3, 6)),
    "transposed 2d, groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        (4, 3, 3),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 3, 4)),
    "layer norm": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6)),
    "fallback": (lambda: nn.PReLU(6), (6, 3)),
}


def problem(name, samples=5, rows_per_sample=2):
    torch.manual_seed(4)
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    first = nn.Linear(shape[-1], shape[-1])
    model = Net(first, layer).double()
    x = torch.randn(samples * rows_per_sample, *shape, dtype=torch.float64)
    # another set of samples is whitened than was fitted
    return model, x, x.flip(0) * 1.5 + 0.1


def fitted(model, x, kind, rows_per_sample=2, batch=2, f=output, **options):
    step = batch * rows_per_sample
    batches = [
        (lambda part=part: f(model, part), len(part) // rows_per_sample) for part in x.split(step)
    ]
    options = {"rank": 4, **options}
    return Whitening.fit(model, batches, kind=kind, rows_per_sample=rows_per_sample, **options)


def features_of(model, x, projection, whitening, rows_per_sample=2, f=output, **options):
    sketcher = GradientSketcher(
        model, projection, rows_per_sample=rows_per_sample, whitening=whitening, **options
    )
    return sketcher.sketch(lambda: f(model, x), len(x) // rows_per_sample), sketcher


def expected_features(model, x, y, kind, f=output, rows_per_sample=2, rank=4):
    grads = looped_gradients(model, f, (x,), rows_per_sample)
    maps, floored = dense_map(model, f, (x,), grads, kind, rank)
    return dense_whitened(looped_gradients(model, f, (y,), rows_per_sample), maps), floored


# the others take the same paths
FAST = ["linear, positions", "conv2d", "conv2d, groups", "transposed 1d", "fallback"]


@pytest.mark.parametrize(
    "workspace",
    [2**21, pytest.param(500, marks=pytest.mark.full)],
    ids=["one slice", "many slices"],
)
@pytest.mark.parametrize("kind", WHITENING)
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.full) for n in LAYERS]
)
def test_features_are_projected_whitened_gradients(name, kind, workspace, monkeypatch):
    monkeypatch.setitem(weight_module.WORKSPACE_BYTES, "cpu", workspace)
    model, x, y = problem(name)
    whitening = fitted(model, x, kind)
    expected, _ = expected_features(model, x, y, kind)
    assert whitening.floored == ()
    shapes = whitening.shapes
    assert (
        relative_error(whitening.apply(looped_gradients(model, output, (y,), 2)), expected) < 1e-9
    )
    for projection in PROJECTIONS:
        if projection.kind == "kronecker" and any(p.acts_on_patches for p in whitening.parameters):
            with pytest.raises(
                ValueError, match=r"must be of kind 'channels' .* for 'layer.weight'"
            ):
                features_of(model, y, projection, whitening)
            continue
        for norms in (False, True):
            features, sketcher = features_of(model, y, projection, whitening, norms=norms)
            wanted = project(expected, projection, shapes=shapes)
            assert relative_error(features, wanted) < 1e-9, (projection.kind, norms)
            if norms:
                assert relative_error(sketcher.grad_norms, expected.norm(dim=1)) < 1e-9


@pytest.mark.parametrize("kind", ["diagonal", "lowrank", "kfac"])
@pytest.mark.parametrize("name", ["conv2d, groups", "linear"])
def test_few_rows_at_a_time(name, kind, monkeypatch):
    """Slices that begin and end inside of groups."""
    monkeypatch.setitem(weight_module.WORKSPACE_BYTES, "cpu", 500)
    model, x, y = problem(name)
    for projection in (EXACT, Projection("rademacher", 40, seed=3)):
        check(model, x, y, kind, projection)


def check(model, x, y, kind, projection=EXACT, f=output, rows_per_sample=2, tolerance=1e-9):
    """Fitted to x, whitened features of y against the dense oracle; what was floored."""
    whitening = fitted(model, x, kind, rows_per_sample, f=f)
    expected, floored = expected_features(model, x, y, kind, f, rows_per_sample)
    if kind != "none":
        names = [name for name, _ in model.named_parameters()]
        assert whitening.floored == tuple(
            n for n, is_zero in zip(names, floored, strict=True) if is_zero
        )
    features, _ = features_of(model, y, projection, whitening, rows_per_sample, f)
    if projection.kind != "none":
        expected = project(expected, projection, shapes=whitening.shapes)
    assert torch.isfinite(features).all()
    assert relative_error(features, expected) < tolerance
    return whitening


def attention_output(model, x):
    return unet_output(model, x, torch.arange(2).mul(97).repeat(len(x) // 2))


@pytest.mark.parametrize(
    "projection, kind",
    [
        (EXACT, "kfac"),
        (Projection("sjlt", 1000, seed=3), "lowrank"),
        pytest.param(EXACT, "scale", marks=pytest.mark.full),
        pytest.param(EXACT, "diagonal", marks=pytest.mark.full),
        pytest.param(Projection("rademacher", 100, seed=3), "kfac", marks=pytest.mark.full),
        pytest.param(
            Projection("kronecker", 1000, seed=3, factor_dim=6),
            "channels",
            marks=pytest.mark.full,
        ),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_unet(projection, kind):
    """A whole U-Net; the keys' bias, which softmax does not see, is floored and listed."""
    model, (x, _) = small_unet(), unet_rows(4, 2)
    maps = dense_unet_features(model, x, kind)
    whitening = fitted(model, x, kind, f=attention_output)
    assert all(name.endswith("to_k.bias") for name in whitening.floored)
    assert len(whitening.floored) == 4
    features, _ = features_of(model, x, projection, whitening, f=attention_output)
    expected = maps
    if projection.kind != "none":
        expected = project(expected, projection, shapes=whitening.shapes)
    assert relative_error(features, expected) < 1e-7


def dense_unet_features(model, x, kind):
    """Whitened gradients parameter by parameter: whole maps of a U-Net would not fit."""
    grads = looped_gradients(model, attention_output, (x,), 2)
    moments = second_moments(model, attention_output, (x,), kind == "channels")
    owners = {
        id(m.bias): m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None
    }
    parts, sizes = [], []
    for p, g in zip(
        model.parameters(), grads.split([p.numel() for p in model.parameters()], 1), strict=True
    ):
        sizes.append(float(g.square().mean().sqrt()))
        key = id(p) if id(p) in moments else id(owners.get(id(p)))
        if key in moments and kind in ("channels", "kfac", "lowrank"):
            ((left, right),) = moments[key]
            rank = 4 if kind == "lowrank" else None
            left = torch.tensor(inverse_root(left, 0.01)) if rank is None else torch.eye(len(left))
            left = left.double()
            if p.ndim == 1:
                g = g @ left
            else:
                right = torch.tensor(inverse_root(right, 0.01, rank))
                block = g.reshape(len(g), p.shape[0], p.shape[1], -1).transpose(2, 3)
                shape = block.shape
                block = left @ block.reshape(len(g), p.shape[0], -1)
                block = block.reshape(-1, len(right)) @ right
                g = block.reshape(shape).transpose(2, 3).reshape(len(g), -1)
        squares = g.square().mean(0)
        if kind == "diagonal":
            scale = (squares + 0.1 * squares.mean()).rsqrt()
            parts.append((g, torch.where(squares.sqrt() > 0, scale, 0.0), squares.sqrt()))
        else:
            parts.append((g, squares.mean().rsqrt(), None))
    least = 1e-6 * sorted(sizes)[(len(sizes) - 1) // 2]
    result = []
    for size, (g, scale, entries) in zip(sizes, parts, strict=True):
        if entries is not None:
            scale = torch.where(entries > least, scale, 0.0).bfloat16().double()
        result.append(g * scale if size > least else 0 * g)
    return torch.cat(result, 1)


class Shared(nn.Module):
    """A layer used twice, and a weight that two modules share."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second, self.third = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.third(self.second(self.first(self.first(x).tanh())).tanh())


@pytest.mark.parametrize("kind", WHITENING)
def test_shared_weights(kind):
    torch.manual_seed(5)
    model, x = Shared().double(), torch.randn(10, 3, 5, dtype=torch.float64)
    check(model, x, x.flip(0) + 1, kind, Projection("sjlt", 300))


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("kind", ["diagonal", "lowrank", "kfac"])
def test_checkpointing(kind):
    model, x, y = problem("conv2d")
    expected, _ = expected_features(model, x, y, kind)
    wrapped = Checkpointed(model)
    features, _ = features_of(wrapped, y, EXACT, fitted(wrapped, x, kind))
    assert relative_error(features, expected) < 1e-9


def test_tied_embedding_is_scaled_only():
    """An embedding's rows are no vectors of a layer; a weight that it shares has no factors."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(11, 4), nn.Linear(4, 11)
            self.out.weight = self.embedding.weight

        def forward(self, tokens):
            return self.out(self.embedding(tokens).tanh())

    torch.manual_seed(5)
    model, tokens = Tied().double(), torch.randint(0, 11, (8, 6))
    whitening = fitted(model, tokens, "kfac")
    assert [p.is_rotated for p in whitening.parameters] == [False, False]
    plain = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)).double()
    for kind in WHITENING:
        check(plain, tokens, tokens.flip(0), kind, Projection("sjlt", 300))
    features, _ = features_of(model, tokens, EXACT, whitening)
    grads = looped_gradients(model, output, (tokens,), 2)
    assert relative_error(features, whitening.apply(grads)) < 1e-12


def test_adapters():
    """Thin pairs of linear layers beside a frozen one; wide factors are sketched as they stream."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(40, 30).requires_grad_(False)
            self.a, self.b = nn.Linear(40, 2, bias=False), nn.Linear(2, 30, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    torch.manual_seed(5)
    model = Adapted().double()
    x = torch.randn(12, 3, 40, dtype=torch.float64) * torch.logspace(0, -3, 40).double()
    names = ["a.weight", "b.weight"]
    whitening = fitted(model, x, "kfac")
    assert whitening.names == tuple(names)
    features, _ = features_of(model, x, EXACT, whitening)
    model.base.requires_grad_(True)
    grads = looped_gradients(model, output, (x,), 2)
    sizes = [p.numel() for p in model.parameters()]
    maps, _ = dense_map(model, output, (x,), grads, "kfac")
    parts = [
        g @ torch.tensor(m)
        for n, g, m in zip(dict(model.named_parameters()), grads.split(sizes, 1), maps, strict=True)
        if n in names
    ]
    assert relative_error(features, torch.cat(parts, 1)) < 1e-9


def test_wide_factors_are_sketched(monkeypatch):
    """Where a moment has rank r or less, its sketch is exact; the trace says what is left."""
    monkeypatch.setattr(fit_module, "MOST_DENSE", 16)
    torch.manual_seed(5)
    mixing = torch.randn(3, 40, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(40, 5)).double()
    x = torch.randn(12, 2, 3, dtype=torch.float64) @ mixing
    whitening = fitted(model, x, "lowrank")
    assert isinstance(whitening.parameters[0].columns, roots_module.LowRankRoot)
    check(model, x, x + 1, "lowrank", tolerance=1e-6)
    # a full spectrum that falls off: close to the exact one
    values = torch.randn(4000, 1, 40, dtype=torch.float64) * torch.logspace(0, -3, 40).double()
    exact = roots_module.DenseMoment(1, 40, values.device)
    sketch = roots_module.SketchedMoment(1, 40, 8, values.device)
    for part in values.split(1000):
        exact.add(part)
        sketch.add(part)
    wanted, found = exact.root(0.01, 8), sketch.root(0.01, 8)
    eye = torch.eye(40, dtype=torch.float64)
    assert relative_error(found.apply(eye), wanted.apply(eye)) < 1e-3


def test_factors_are_those_of_a_dense_computation():
    model, x, _ = problem("conv2d, groups")
    for kind in ("channels", "kfac"):
        whitening = fitted(model, x, kind, batch=1)
        # the same whatever the batch
        other = fitted(model, x, kind, batch=5)
        dense = second_moments(model, output, (x,), kind == "channels")
        index = whitening.names.index("layer.weight")
        parameter, groups = whitening.parameters[index], dense[id(model.layer.weight)]
        for side, root in ((0, parameter.rows), (1, parameter.columns)):
            wanted = torch.stack([torch.tensor(inverse_root(g[side], 0.01)) for g in groups])
            assert relative_error(root.matrix, wanted) < 1e-9
        for mine, its in zip(whitening.parameters, other.parameters, strict=True):
            assert relative_error(mine.scale, its.scale) < 1e-9


def test_at_most_64_positions_of_a_row_count():
    seen = fit_module.sampled_positions(100)
    assert len(seen) == 64 == len(seen.unique())
    assert torch.equal(seen, fit_module.sampled_positions(100))
    assert torch.equal(fit_module.sampled_positions(64), torch.arange(64))
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    x = torch.randn(4, 2, 10, 10, dtype=torch.float64)
    whitening = fitted(conv, x, "kfac", rows_per_sample=1)
    patches = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2)[:, seen]
    patches = patches.unflatten(2, (2, 9)).transpose(2, 3).flatten(2).flatten(0, 1)
    wanted = inverse_root((patches.T @ patches / len(patches)).numpy(), 0.01)
    assert relative_error(whitening.parameters[0].columns.matrix[0], torch.tensor(wanted)) < 1e-9


class Degenerate(nn.Module):
    """A dead channel, a layer of zeros, one without input, and a bias without gradient."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(4, 4, affine=False)
        self.zero, self.idle = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = x * torch.tensor([1.0, 0.0, 1.0], dtype=x.dtype)[:, None, None]
        y = self.norm(self.conv(x))
        return (
            y + 0 * self.zero(y) + self.idle(torch.zeros(len(x), 4, dtype=x.dtype))[..., None, None]
        )


@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("kind", WHITENING)
def test_what_has_no_gradient_stays_quiet(kind, samples, recwarn):
    torch.manual_seed(5)
    model = Degenerate().double()
    x = torch.randn(samples * 2, 3, 4, 4, dtype=torch.float64)
    # a bias before a norm has a gradient of rounding alone
    whitening = check(model, x, x + 0.5, kind, Projection("sjlt", 300), tolerance=1e-6)
    assert {"conv.bias", "zero.weight", "zero.bias", "idle.weight"} <= set(whitening.floored)
    for parameter in whitening.parameters:
        assert torch.isfinite(parameter.scale).all()
    single = copy.deepcopy(model).float()
    narrow = fitted(single, x.float(), kind)
    assert {"conv.bias", "zero.weight", "zero.bias", "idle.weight"} <= set(narrow.floored)
    features, _ = features_of(single, x.float(), EXACT, narrow)
    assert torch.isfinite(features).all()
    assert not [w for w in recwarn if "whiten" in str(w.filename)]


def test_scales_make_the_mean_squared_entry_one():
    model, x, _ = problem("conv2d")
    for kind in ("scale", "channels", "lowrank", "kfac"):
        features, sketcher = features_of(model, x, EXACT, fitted(model, x, kind))
        sizes = [torch.Size(shape).numel() for shape in sketcher.shapes]
        for part in features.split(sizes, dim=1):
            assert float(part.square().mean()) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("kind", ["diagonal", "lowrank", "kfac"])
def test_batch_size_and_order_do_not_matter(kind):
    model, x, y = problem("conv2d", samples=6)
    whitening = fitted(model, x, kind)
    whole, sketcher = features_of(model, y, Projection("sjlt", 300), whitening)
    rows = y.unflatten(0, (6, 2))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    for part in order.split(2):
        few = sketcher.sketch(lambda part=part: output(model, rows[part].flatten(0, 1)), 2)
        assert relative_error(few, whole[part]) < 1e-12
    # one row a sample: the features of a sample are the sum of its rows'
    single, _ = features_of(model, y, Projection("sjlt", 300), whitening, rows_per_sample=1)
    assert relative_error(single.unflatten(0, (6, 2)).sum(1), whole) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """As good as whitening the gradients that the same autocast gives."""
    model, x, y = problem("conv2d")
    model, x, y = model.float(), x.float(), y.float()

    def f(model, x):
        with torch.autocast("cpu", dtype):
            out = model(x)
        return out.float().tanh().flatten(1).square().mean(1)

    for kind in ("diagonal", "channels", "kfac"):
        whitening = fitted(model, x, kind, f=f)
        features, _ = features_of(model, y, EXACT, whitening, f=f)
        plain, _ = features_of(model, y, EXACT, None, f=f)
        assert features.dtype == torch.float32
        assert relative_error(features, whitening.apply(plain)) < 1e-5


def test_half_precision_has_a_higher_floor():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(6, 6)

    def f(model, x, enabled=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = model[1](model[0](x))
        return model[2](y.float()).square().mean(1) + 1e-4 * 0 * x.sum(1)

    def weak(model, x, enabled=True):
        return f(model, x, enabled) * 1 + 0

    with torch.no_grad():
        model[1].weight.mul_(1e-5)
    # the first layer's gradient is 1e-5 of the others'
    assert "0.weight" not in fitted(model, x, "scale", 1, f=lambda m, r: weak(m, r, False)).floored
    assert "0.weight" in fitted(model, x, "scale", 1, f=weak).floored


def test_none_changes_no_bit():
    model, x, _ = problem("conv2d")
    model, x = model.float(), x.float()
    whitening = fitted(model, x, "none")
    for projection in PROJECTIONS:
        plain, _ = features_of(model, x, projection, None)
        features, _ = features_of(model, x, projection, whitening)
        assert torch.equal(plain, features)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_all_of_it(kind, tmp_path):
    model, x, _ = problem("conv2d")
    model, x = model.float(), x.float()
    whitening = fitted(model, x, kind, function="mean")
    whitening.save(tmp_path / "w.safetensors")
    loaded = Whitening.load(tmp_path / "w.safetensors", kind=kind, function="mean", rank=4)
    assert loaded.identity == whitening.identity
    assert loaded.nbytes == whitening.nbytes
    assert loaded.names == whitening.names
    before, _ = features_of(model, x, Projection("sjlt", 300), whitening)
    after, _ = features_of(model, x, Projection("sjlt", 300), loaded)
    assert torch.equal(before, after)
    if kind in ("channels", "kfac"):
        rows = [p.rows for p in loaded.parameters]
        assert rows[2] is rows[3], "a bias shares its layer's B"


def test_another_identity():
    model, x, _ = problem("linear")
    one, two = (fitted(model, x, "scale", function=name) for name in ("loss", "mean"))
    assert one.identity != two.identity
    assert one.identity != fitted(model, x * 2, "scale", function="loss").identity
    assert one.identity == fitted(model, x, "scale", function="loss").identity


def test_refusals(tmp_path):
    model, x, _ = problem("conv2d")
    whitening = fitted(model, x, "lowrank", function="loss")

    def sketcher(model, **options):
        return GradientSketcher(model, EXACT, whitening=whitening, **options)

    with pytest.raises(ValueError, match="must be of function 'mean', got 'loss'"):
        whitening.check(function="mean")
    with pytest.raises(ValueError, match="must be of rank 64, got 4"):
        whitening.check(kind="lowrank", rank=64)
    whitening.save(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="must be of kind 'kfac', got 'lowrank'"):
        Whitening.load(tmp_path / "w.safetensors", kind="kfac")
    with pytest.raises(
        ValueError, match=r"of the chosen parameters, got one that has 'first\.bias'"
    ):
        sketcher(model, parameters=lambda name, _: name != "first.bias")
    renamed = nn.Sequential(model.first, model.layer)
    with pytest.raises(ValueError, match=r"the chosen parameters, got one without '0\.weight'"):
        sketcher(renamed)
    wider = Net(model.first, nn.Conv2d(3, 5, 3, padding=1)).double()
    with pytest.raises(
        ValueError, match=r"'layer\.weight' \[5, 3, 3, 3\], got one of \[4, 3, 3, 3\]"
    ):
        sketcher(wider)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="must be of this model, got one fitted to other weights"):
        sketcher(other)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="must hold a whitening"):
        Whitening.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"grads must be \[B, 154\]"):
        whitening.apply(torch.zeros(2, 3))
    batches = [(lambda: output(model, x), 5)]
    for options, message in (
        ({"kind": "foo"}, "kind must be one of none, scale"),
        ({"rank": 0}, "rank must be a positive int"),
        ({"damping": 0.0}, "damping must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Whitening.fit(model, batches, **options)
    with pytest.raises(TypeError, match="batches must be gone through twice"):
        Whitening.fit(model, iter(batches))
    with pytest.raises(ValueError, match="at least one sample"):
        Whitening.fit(model, [])
    with pytest.raises(ValueError, match="must be finite to fit a whitening"):
        fitted(model, x * float("nan"), "scale")


def test_the_plan_says_what_it_costs():
    model, x, _ = problem("conv2d")
    whitening = fitted(model, x, "kfac")
    _, sketcher = features_of(model, x, Projection("sjlt", 300), whitening)
    plan = sketcher.plan(lambda: output(model, x), 5)
    bare = GradientSketcher(model, Projection("sjlt", 300), rows_per_sample=2)
    less = bare.plan(lambda: output(model, x), 5)
    assert plan.flop - less.flop == plan.whitening_flop > 0
    assert "whitening: kfac, factors" in str(plan)
    assert "A on slices" in plan.layers[1].kernel
    model = Degenerate().double()
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    _, sketcher = features_of(model, x, EXACT, fitted(model, x, "scale"))
    assert "rounding alone, so left out: conv.bias" in str(sketcher.plan(lambda: model(x), 2))


class Products(TorchDispatchMode):
    """How many products of entries were made."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["scale", "diagonal"])
def test_scales_cost_no_product(kind):
    """On a CPU they are in the signs of a sketch that keeps tables."""
    model, x, _ = problem("conv2d")
    counts = []
    for each in ("none", kind):
        _, sketcher = features_of(model, x, Projection("sjlt", 300), fitted(model, x, each))
        with Products() as products:
            sketcher.sketch(lambda: output(model, x), 5)
        counts.append(products.count)
    assert counts[0] == counts[1]
