"""The plan of a batch: figures worked out by hand, and what a batch really allocates."""

import copy

import pytest
import torch
from test_sketcher import small_unet, unet_output, unet_rows
from torch import nn
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize(
    "projection",
    [
        pytest.param(p, marks=pytest.mark.full if p.kind in ("none", "kronecker", "sjlt") else ())
        for p in KINDS
    ],
    ids=lambda p: p.kind,
)
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


class Blocks(nn.Module):
    """Blocks that may be checkpointed, as people's models do it."""

    def __init__(self, reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 24))
            for _ in range(4)
        )
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def mean_square(y):
    return y.square().flatten(1).mean(1)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model, x = (
        nn.Sequential(nn.Linear(8, 16), stack, nn.Linear(16, 3)).eval(),
        torch.randn(4, 30, 8),
    )
    return model, lambda: mean_square(model(x)), [x]


def tokens():
    model = nn.Sequential(nn.Embedding(90, 32), nn.Linear(32, 32), nn.RMSNorm(32))
    x = torch.randint(90, (4, 50))
    return model, lambda: mean_square(model(x)), [x]


def convolutions():
    model = copy.deepcopy(small_unet(block_out_channels=(16, 32))).float()
    x, t = unet_rows(8, 1)
    x = x.float()
    return model, lambda: unet_output(model, x, t), [x, t]


def blocks(reentrant):
    model, x = Blocks(reentrant), torch.randn(4, 200, 24, requires_grad=True)
    return model, lambda: mean_square(model(x)), [x]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(12, 16, num_layers=2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def recurrent(kind):
    """Of which a library keeps more for the backward than any tensor's shape says."""
    model, x = Recurrent(kind), torch.randn(5, 20, 12)
    return model, lambda: mean_square(model(x)), [x]


def halves():
    """The base in 16 bits, an adapter in 32: frozen weights keep no input."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).bfloat16().requires_grad_(False)
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
    whole = nn.ModuleList([model, down, up])
    x = torch.randn(8, 40, 64, dtype=torch.bfloat16)

    def f():
        y = model[0](x)
        y = model[1](y) + up(down(y.float())).bfloat16()
        return mean_square(model[2](y.tanh()).float())

    return whole, f, [x]


@pytest.mark.parametrize("projection", KINDS, ids=lambda p: p.kind)
@pytest.mark.parametrize(
    "make",
    [
        encoder,
        tokens,
        convolutions,
        halves,
        lambda: recurrent(nn.LSTM),
        lambda: recurrent(nn.GRU),
        lambda: blocks(None),
        lambda: blocks(False),
        lambda: blocks(True),
    ],
    ids=[
        *("encoder", "tokens", "convolutions", "halves", "lstm", "gru"),
        *("kept", "checkpoint", "re-entrant"),
    ],
)
@pytest.mark.sweep(1)
def test_memory_is_what_is_measured(make, projection):
    from dtrak.runs.measure import TensorMeter

    torch.manual_seed(0)
    model, f, inputs = make()
    samples, known = len(inputs[0]), [*inputs, *model.state_dict().values()]
    sketcher = GradientSketcher(model, projection)
    plan = sketcher.plan(f, samples)
    assert plan.unknown == ""
    # signs and places are made once
    sketcher.sketch(f, samples)
    with TensorMeter(known=known) as meter:
        sketcher.sketch(f, samples)
    assert plan.memory.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.1)
    assert plan.batch_bytes == plan.memory.peak_bytes
    if not plan.memory.reentrant:
        features = samples * sketcher.proj_dim * 4
        with TensorMeter(known=known) as meter, sketcher.batch(samples):
            held = f()
            alive = meter.live_bytes - features
        assert held.requires_grad
        assert plan.memory.activation_bytes == pytest.approx(alive, rel=0.1)


def test_weights_by_dtype_and_what_is_checkpointed():
    whole, f, _ = halves()
    plan = GradientSketcher(whole, KINDS[2]).plan(f, 8)
    assert plan.weight_bytes == {"bfloat16": 2 * 3 * (64 * 64 + 64), "float32": 4 * 2 * 4 * 64}
    assert plan.fixed_bytes == sum(plan.weight_bytes.values())
    assert "weights 25 kB bfloat16 + 2.05 kB float32, activations " in str(plan)
    assert "checkpointing" not in str(plan)
    plans = {}
    for reentrant in (None, False, True):
        model, f, _ = blocks(reentrant)
        plans[reentrant] = GradientSketcher(model, KINDS[2]).plan(f, 4)
    assert [plans[r].memory.checkpointed for r in plans] == [0, 12, 12]
    assert [plans[r].memory.reentrant for r in plans] == [0, 0, 12]
    assert plans[False].memory.activation_bytes < 0.5 * plans[None].memory.activation_bytes
    assert "with checkpointing of 12 of 12 layers" in str(plans[False])
    assert "with checkpointing (re-entrant) of 12 of 12 layers" in str(plans[True])
    tied = nn.ModuleList([nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)])
    tied[1].weight = tied[0].weight
    plan = GradientSketcher(tied, KINDS[0]).plan(lambda: tied[0](torch.ones(2, 5)), 2)
    assert plan.weight_bytes == {"float32": 100}


@pytest.mark.parametrize("projection", KINDS, ids=lambda p: p.kind)
def test_a_model_on_the_meta_device_is_planned(projection):
    """A model of any size: nothing of it is there."""
    sizes = []
    for device in ("cpu", "meta"):
        model = encoder()[0].to(device)
        # an attention whose product is never kept
        x = torch.randn(4, 300, 8, device=device)
        f = lambda m=model, x=x: mean_square(m(x))
        plan = GradientSketcher(model, projection).plan(f, 4)
        assert plan.unknown == ""
        sizes.append((plan.memory.peak_bytes, plan.memory.activation_bytes, plan.fixed_bytes))
    for on_cpu, on_meta in zip(*sizes, strict=True):
        assert on_meta == pytest.approx(on_cpu, rel=0.1)


def test_a_plan_leaves_everything_as_it_was():
    model, f, inputs = blocks(False)
    sketcher, fresh = (GradientSketcher(model, KINDS[2], norms=True) for _ in range(2))
    expected = fresh.sketch(f, 4)
    norms = fresh.grad_norms
    state = torch.get_rng_state()
    fresh.plan(f, 4)
    sketcher.plan(f, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert inputs[0].grad is not None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert fresh.grad_norms is norms
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(sketcher.sketch(f, 4), expected)
    assert torch.equal(sketcher.grad_norms, norms)


def test_values_that_a_plan_lacks():
    model, x = nn.Linear(50, 50), torch.randn(16, 50)

    def checked():
        y = model(x)
        # taken for false
        if not torch.isfinite(y).all() and (y == 0).any():
            raise ValueError("not finite")
        return mean_square(y)

    plan = GradientSketcher(model, KINDS[2]).plan(checked, 16)
    assert plan.unknown == ""
    plan = GradientSketcher(model, KINDS[2]).plan(lambda: model(x)[x[:, 0] > 0], 16)
    assert plan.memory is None
    assert plan.unknown.startswith("DynamicOutputShapeException: aten.nonzero")
    assert "activations that autograd keeps are not counted: DynamicOutput" in str(plan)
    assert plan.batch_bytes == plan.kept_bytes + plan.feature_bytes + plan.layers[0].work_bytes


def test_weights_that_do_not_fit_leave_no_room_for_a_batch():
    model, x = nn.Linear(50, 50), torch.randn(16, 50)
    plan = plan_of(model, x, KINDS[2], memory_budget=5000)
    assert plan.fitting_samples == 0
    assert "weights: need 10.2 kB alone" in plan.misfits()
