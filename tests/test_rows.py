"""Rows are the samples they are taken for, or the batch is refused by the module's name."""

import copy
import warnings

import pytest
import torch
from numerics import relative_error
from test_sketcher import EXACT, check_module
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dtrak_kernels import GradientSketcher, Projection, project

B = 4


def output(model, x):
    y = model(x)
    return y.tanh().flatten(1).cumsum(1).square().mean(1)


def data(*shape, seed=1):
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64)


def single(model, f, samples):
    """``[B, P]`` by a float64 loop of backwards of one sample each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for sample in samples:
        grads = torch.autograd.grad(f(model, sample).sum(), parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def features(model, f, x, samples=B, **options):
    return GradientSketcher(model, EXACT, **options).sketch(lambda: f(model, x), samples)


class SequenceFirst(nn.Module):
    """Its layers see ``[T, B, D]``."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x):
        y = self.norm(self.first(x.transpose(0, 1)).tanh())
        return self.last(y.transpose(0, 1))


class Expert(nn.Module):
    """One expert sees the tokens that were routed to it, the other one sees all."""

    def __init__(self, routes):
        super().__init__()
        self.expert, self.usual, self.routes = nn.Linear(8, 8), nn.Linear(8, 8), routes

    def forward(self, x):
        y = self.usual(x)
        tokens = y.flatten(0, 1)
        return tokens.index_add(0, self.routes, self.expert(tokens[self.routes])).view_as(y)


class Positions(nn.Module):
    """Tokens, and a table of positions that is looked up once."""

    def __init__(self, indices):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 8), nn.Embedding(16, 8)
        self.last, self.indices = nn.Linear(8, 8), indices

    def forward(self, tokens):
        positions = self.positions(self.indices(tokens.shape[1]))
        return self.last((self.tokens(tokens) + positions).tanh())


def test_sequences_come_first_or_last():
    torch.manual_seed(0)
    model = SequenceFirst().double()
    for T in (6, 8, 3):
        x = data(B, T, 8)
        expected = single(model, output, x.split(1))
        assert relative_error(features(model, output, x), expected) < 1e-12, T
    x = data(B, B, 8)
    with pytest.raises(RuntimeError, match=r"module 'norm' \(LayerNorm\) with output \[4, 4, 8\]"):
        features(model, output, x)
    # once it was seen where samples are, a sequence may be as long as the batch
    sketcher = GradientSketcher(model, EXACT)
    sketcher.sketch(lambda: output(model, data(B, 6, 8)), B)
    found = sketcher.sketch(lambda: output(model, x), B)
    assert relative_error(found, single(model, output, x.split(1))) < 1e-12


def test_a_causal_model_whose_last_position_counts_for_nothing():
    """Masking the last sample alone would show nothing: its row is zero whatever is masked."""
    torch.manual_seed(0)
    model = SequenceFirst().double()
    causal = lambda model, x: model(x)[:, :-1].square().sum((1, 2))
    for samples in (2, 3, 5):
        with pytest.raises(RuntimeError, match="rows that are not those of single samples"):
            features(model, causal, data(samples, samples, 8), samples)


@pytest.mark.parametrize(
    "routes",
    [[0, 1, 2, 9], [0, 3, 7, 8], [1, 3, 4, 11], [0, 3, 4, 10], [8, 9, 10, 11]],
    ids=str,
)
def test_an_expert_that_sees_as_many_tokens_as_there_are_samples(routes):
    torch.manual_seed(0)
    model, x = Expert(torch.tensor(routes)).double(), data(B, 3, 8)
    with pytest.raises(RuntimeError, match=r"module 'expert' \(Linear\) .* tokens of an expert"):
        features(model, output, x)
    # without it nothing is wrong
    usual = ["usual.weight", "usual.bias"]
    model.expert.requires_grad_(False)
    found = features(model, output, x, parameters=usual)
    of_sample = lambda model, sample: output(model, x)[sample]
    assert relative_error(found, single(model, of_sample, range(B))) < 1e-12


def test_every_order_of_tokens_that_is_wrong_is_found():
    """Of all tokens in order, whatever they are; the right ones are right."""
    torch.manual_seed(0)
    model, x = Expert(None).double(), data(3, 2, 8)
    taken = 0
    for routes in torch.combinations(torch.arange(6), 3):
        model.routes = routes
        if (routes // 2).tolist() == [0, 1, 2]:
            features(model, output, x, 3)
            taken += 1
            continue
        with pytest.raises(RuntimeError, match="module 'expert'"):
            features(model, output, x, 3)
    assert taken == 8


class Mixture(nn.Module):
    """Two of three experts see each token."""

    def __init__(self):
        super().__init__()
        self.gate, self.last = nn.Linear(8, 3), nn.Linear(8, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)) for _ in range(3)
        )

    def forward(self, x):
        tokens = x.flatten(0, 1)
        shares, chosen = self.gate(tokens).softmax(1).topk(2)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            if len(rows):
                seen = expert(tokens[rows]) * shares[rows, place, None]
                mixed = mixed.index_add(0, rows, seen)
        return self.last(mixed.view_as(x))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mixture_of_experts_is_served_one_sample_at_a_time(rows):
    torch.manual_seed(0)
    model, x = Mixture().double(), data(3 * rows, 7, 8)
    sketcher = GradientSketcher(model, EXACT, rows_per_sample=rows)
    with pytest.raises(RuntimeError, match=r"'experts\.\d\.\d' .* one sample at a time"):
        sketcher.sketch(lambda: output(model, x), 3)
    parts = x.split(rows)
    found = torch.cat([sketcher.sketch(lambda part=part: output(model, part), 1) for part in parts])
    of_sample = lambda model, sample: output(model, parts[sample]).sum()
    assert relative_error(found, single(model, of_sample, range(3))) < 1e-12


def test_a_packed_sequence_is_served_alone():
    torch.manual_seed(0)
    model, x = nn.LSTM(8, 8).double(), data(6, B, 8)

    def of(model, sample, length):
        packed = nn.utils.rnn.pack_padded_sequence(x[:, sample : sample + 1], [length])
        return model(packed)[0].data.square().sum()[None]

    lengths = [6, 5, 2, 1]
    sketcher = GradientSketcher(model, EXACT)
    found = [sketcher.sketch(lambda s=s: of(model, s, lengths[s]), 1) for s in range(B)]
    of_sample = lambda model, sample: of(model, sample, lengths[sample])[0]
    assert relative_error(torch.cat(found), single(model, of_sample, range(B))) < 1e-12


@pytest.mark.parametrize("kind", ["none", "sjlt", "kronecker", "rademacher"])
@pytest.mark.parametrize("indices", ["one row", "one dimension"])
def test_a_table_of_positions_for_the_whole_batch(indices, kind):
    torch.manual_seed(0)
    looked = {"one row": lambda T: torch.arange(T)[None], "one dimension": torch.arange}[indices]
    model = Positions(looked).double()
    projection = EXACT if kind == "none" else Projection(kind, 256, seed=3)
    for options in ({}, {"norms": True}):
        sketcher = GradientSketcher(model, projection, **options)
        for T in (6, 3):
            x = torch.randint(9, (B, T))
            found = sketcher.sketch(lambda x=x: output(model, x), B)
            expected = single(model, output, x.split(1))
            if options:
                assert relative_error(sketcher.grad_norms, expected.norm(dim=1)) < 1e-12
            if kind != "none":
                expected = project(expected, projection, shapes=sketcher.shapes)
            assert relative_error(found, expected) < 1e-12


def test_a_table_of_positions_as_long_as_the_batch():
    torch.manual_seed(0)
    model, x = Positions(torch.arange).double(), torch.randint(9, (B, B))
    with pytest.raises(
        RuntimeError, match=r"'positions' \(Embedding\) .* look it up by .*\[1, T\]"
    ):
        features(model, output, x)
    # known from another batch
    sketcher = GradientSketcher(model, EXACT)
    sketcher.sketch(lambda: output(model, x[:, :3]), B)
    found = sketcher.sketch(lambda: output(model, x), B)
    assert relative_error(found, single(model, output, x.split(1))) < 1e-12
    model.indices = lambda T: torch.arange(T)[None]
    assert relative_error(features(model, output, x), single(model, output, x.split(1))) < 1e-12


def test_what_a_repeated_table_does_not_fit_is_explained():
    torch.manual_seed(0)
    model = Positions(lambda T: torch.arange(T)[None]).double()
    x = torch.randint(9, (B, 6))
    broken = lambda: output(model, x) + model.positions(torch.arange(6)[None]).view(1, 48).sum()
    with pytest.raises(RuntimeError) as caught:
        GradientSketcher(model, EXACT).sketch(broken, B)
    assert "'positions' ran once for the whole batch" in caught.value.__notes__[0]


def test_several_rows_of_a_layer_for_every_row_of_the_batch():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)
            self.scale, self.last = nn.PReLU(4), nn.Linear(4 * 5, 3)

        def forward(self, x):
            frames = self.scale(self.norm(self.conv(x.flatten(0, 1))))
            return self.last(frames.flatten(1)).unflatten(0, x.shape[:2])

    torch.manual_seed(0)
    model = Frames().double()
    f = lambda model, x: model(x).square().flatten(1).sum(1)
    for frames in (3, 2, 1):
        x = data(B, frames, 2, 7)
        assert relative_error(features(model, f, x), single(model, f, x.split(1))) < 1e-12
    x = data(6, 3, 2, 7)
    pairs = single(model, f, x.split(1)).unflatten(0, (3, 2)).sum(1)
    assert relative_error(features(model, f, x, 3, rows_per_sample=2), pairs) < 1e-12


def test_samples_that_meet_are_refused_where_they_meet():
    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.before(x)
            return self.after(y - 1e-6 * y.mean(0))

    torch.manual_seed(0)
    model, x = Meeting().double(), data(B, 8)
    with pytest.raises(RuntimeError, match=r"'before' \(Linear\) .* samples meet in what follows"):
        features(model, output, x)


def test_the_real_cause_is_named():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3).double(), data(B, 8)
    mean = lambda: F.mse_loss(model(x), torch.zeros(B, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got \[\]: a loss averaged over the batch\? .*'none'"):
        GradientSketcher(model, EXACT).sketch(mean, B)
    with pytest.raises(
        RuntimeError, match=r"the same for all rows.* a loss averaged over the batch"
    ):
        GradientSketcher(model, EXACT).sketch(lambda: mean().expand(B), B)
    with pytest.raises(ValueError, match=r"num_samples is 2, this looks like 4"):
        GradientSketcher(model, EXACT).sketch(lambda: output(model, x), 2)
    with pytest.raises(
        RuntimeError, match=r"is num_samples wrong\? This batch seems to have 4 sam"
    ):
        GradientSketcher(model, EXACT).sketch(lambda: output(model, x), 3)
    with pytest.raises(ValueError, match=r"got \[2\]: one per sample, where a sample has 2 rows"):
        GradientSketcher(model, EXACT, rows_per_sample=2).sketch(
            lambda: output(model, x).unflatten(0, (2, 2)).sum(1), 2
        )
    second = SequenceFirst().double()
    with (
        pytest.raises(RuntimeError, match="samples seem to be in the second dimension"),
        GradientSketcher(second, EXACT).batch(B),
    ):
        second(data(B, 6, 8))


def test_a_layer_that_sees_samples_where_others_see_rows():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.label, self.embed = nn.Embedding(5, 8), nn.Linear(8, 8)
            self.scale, self.last = nn.PReLU(8), nn.Linear(8, 3)

        def forward(self, x):
            steps = len(x) // self.samples
            condition = self.scale(self.embed(self.label(self.labels)))
            return self.last(x * condition.repeat_interleave(steps, 0))

    torch.manual_seed(0)
    model, x, labels = Conditioned().double(), data(2 * B, 8), torch.randint(5, (B,))

    def of_sample(model, sample):
        model.samples, model.labels = 1, labels[sample : sample + 1]
        return output(model, x[2 * sample : 2 * sample + 2])

    expected = single(model, of_sample, range(B))
    model.samples, model.labels = B, labels
    assert relative_error(features(model, output, x, rows_per_sample=2), expected) < 1e-12


def test_what_a_recomputed_layer_shares_and_has_as_many_rows_of_is_named():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x, bias):
            return (bias @ x) * self.scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(8, 8), Biased()

        def forward(self, x):
            T = x.shape[1]
            return self.layer(self.first(x), torch.arange(T * T, dtype=x.dtype).view(T, T))

    torch.manual_seed(0)
    model = Model().double()
    x = data(B, 5, 8)
    assert relative_error(features(model, output, x), single(model, output, x.split(1))) < 1e-12
    with pytest.raises(RuntimeError, match=r"'layer' \(Biased\) gives an output of another shape"):
        features(model, output, data(B, B, 8))


def test_what_recurrent_layers_and_attention_cannot_be_given():
    torch.manual_seed(0)
    model, x = nn.LSTM(8, 8).double(), data(6, B, 8)
    packed = nn.utils.rnn.pack_padded_sequence(x, [6, 5, 2, 1], enforce_sorted=False)
    f = lambda: model(packed)[0].data.sum().expand(B)
    with pytest.raises(RuntimeError, match=r"'LSTM' \(LSTM\) .* padded, not packed"):
        GradientSketcher(model, EXACT).sketch(f, B)
    model = nn.MultiheadAttention(8, 2).double()
    with pytest.raises(
        RuntimeError, match=r"\(MultiheadAttention\) .* give it tensors \[B, T, n\]"
    ):
        features(model, lambda m, x: m(x, x, x)[0].sum(1), data(B, 8))


class Recurrent(nn.Module):
    """A recurrent layer between two others, all of whose outputs count."""

    def __init__(self, kind, batch_first, **options):
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(6 * options.pop("wide", 1), 3)
        self.layer = kind(5, 6, batch_first=batch_first, **options)
        self.batch_first = batch_first

    def forward(self, x):
        x = self.first(x)
        y, states = self.layer(x if self.batch_first else x.transpose(0, 1))
        states = states if isinstance(states, tuple) else (states,)
        y = y if self.batch_first else y.transpose(0, 1)
        more = torch.cat([s.transpose(0, 1).flatten(1) for s in states], 1).sum(1)
        return self.last(y) + more[:, None, None]


@pytest.mark.parametrize("T", [6, B])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "kind, options",
    [
        (nn.LSTM, {"num_layers": 2}),
        (nn.LSTM, {"bidirectional": True, "wide": 2}),
        (nn.GRU, {}),
        (nn.RNN, {"bias": False}),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_recurrent_layers(kind, options, batch_first, T):
    torch.manual_seed(0)
    model = Recurrent(kind, batch_first, **options)
    check_module(model, data(B, T, 5))
    check_module(model, data(2 * B, T, 5), 2)
    check_module(model, data(B, T, 5), projection=Projection("sjlt", 256))


def test_recurrent_layers_that_begin_somewhere_and_cells():
    class Begun(nn.Module):
        def __init__(self):
            super().__init__()
            self.begin, self.cell = nn.Linear(5, 6), nn.LSTMCell(5, 6)
            self.layer, self.last = nn.LSTM(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.begin(x[:, 0])
            h, c = self.cell(x[:, 0], (h, h.sin()))
            y, _ = self.layer(x.transpose(0, 1), (h[None], c[None]))
            return self.last(y[-1])

    torch.manual_seed(0)
    check_module(Begun(), data(B, 3, 5))
    check_module(Begun(), data(B, B, 5))


@pytest.mark.parametrize("T", [6, B])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["alone", "after a layer"])
def test_multihead_attention(batch_first, T, first):
    class Model(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.first = nn.Identity() if first else nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)

        def forward(self, x):
            mask = torch.zeros(len(x), x.shape[1], dtype=torch.bool)
            mask[:, -1] = True
            x = self.first(x)
            x, masks = x if batch_first else x.transpose(0, 1), {"key_padding_mask": mask}
            y, weights = self.attention(need_weights=True, key=x.sin(), query=x, value=x, **masks)
            y = y if batch_first else y.transpose(0, 1)
            return y + weights.square().sum((1, 2))[:, None, None]

    torch.manual_seed(0)
    for options in ({}, {"add_bias_kv": True}):
        model = Model(**options).eval()
        check_module(model, data(B, T, 8))
        check_module(model, data(2 * B, T, 8), 2)
        names = GradientSketcher(model, EXACT).parameter_names
        assert "attention.out_proj.weight" in names
        # some of them
        chosen = ["attention.in_proj_weight", "attention.out_proj.bias"]
        part = features(model, output, data(B, T, 8), parameters=chosen)
        whole = features(model, output, data(B, T, 8))
        at = torch.cat(
            [torch.full((p.numel(),), name in chosen) for name, p in model.named_parameters()]
        )
        assert relative_error(part, whole[:, at]) < 1e-12


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_masks_of_every_sample(heads):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, heads, batch_first=True)

        def forward(self, x):
            mask = x.mean(2)[:, None, :].expand(-1, x.shape[1], -1).repeat_interleave(heads, 0)
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    torch.manual_seed(0)
    check_module(Model().eval(), data(B, 6, 8))


@pytest.mark.parametrize("T", [6, B])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers_of_torch(batch_first, T):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(
                layer, 2, nn.LayerNorm(8), enable_nested_tensor=False
            )
            self.decoder = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            y = self.decoder(x.sin(), self.encoder(x))
            return self.head(y if batch_first else y.transpose(0, 1))

    torch.manual_seed(0)
    model = Model().eval()
    check_module(model, data(B, T, 8))
    check_module(model, data(2 * B, T, 8), 2, Projection("kronecker", 256, factor_dim=3))
    # where nothing else needs a gradient, torch may take its fast path
    chosen = ["encoder.layers.0.linear1.weight", "encoder.layers.1.self_attn.in_proj_weight"]
    whole = features(model, output, data(B, T, 8))
    for name in chosen:
        part = features(model, output, data(B, T, 8), parameters=[name])
        at = torch.cat(
            [torch.full((p.numel(),), other == name) for other, p in model.named_parameters()]
        )
        assert relative_error(part, whole[:, at]) < 1e-12


def test_outputs_without_rows_are_refused_only_where_they_count():
    class Loaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x):
            y = x * self.scale
            return {"y": y, "balance": y.mean(0), "name": "loaded"}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(5, 5), Loaded()

        def forward(self, x):
            out = self.layer(self.first(x))
            return out["y"] + (out["balance"] if self.counts else 0)

    torch.manual_seed(0)
    model = Model()
    model.counts = False
    check_module(model, data(B, 5))
    model.counts = True
    with pytest.raises(RuntimeError, match=r"output 1 of module 'layer' \(Loaded\) has no rows"):
        features(model.double(), output, data(B, 5))


class Plain(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            return self.second(x)
        return checkpoint(self.second, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_check_happens_once_and_disturbs_nothing(reentrant):
    torch.manual_seed(0)
    model, seen = Plain(reentrant).double(), []
    model.second.register_full_backward_hook(lambda *_: seen.append(1))
    sketcher = GradientSketcher(model, Projection("sjlt", 256))
    unchecked = GradientSketcher(model, Projection("sjlt", 256), check_rows=False)
    x = data(B, 3, 8).requires_grad_()
    x.grad = torch.ones_like(x)
    counts = []
    for samples in (B, B, 2, B, 1, 2):
        seen.clear()
        state, before = torch.get_rng_state(), x.grad.clone()
        found = sketcher.sketch(lambda n=samples: output(model, x[:n]), samples)
        counts.append(len(seen))
        assert torch.equal(torch.get_rng_state(), state)
        through, x.grad = x.grad - before, before.clone()
        expected = unchecked.sketch(lambda n=samples: output(model, x[:n]), samples)
        assert torch.equal(found, expected)
        assert torch.equal(through, x.grad - before)
        x.grad = before
    assert counts == [2, 1, 2, 1, 1, 1]


def test_a_batch_that_is_not_checked_says_so_once():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8).double(), data(B, 8)
    sketcher = GradientSketcher(model, EXACT)

    def run(samples, **options):
        with (sketcher if not options else GradientSketcher(model, EXACT, **options)).batch(
            samples
        ) as found:
            output(model, x[:samples]).sum().backward()
        return found

    with pytest.warns(UserWarning, match="rows of 1 layers are told by their number alone"):
        first = run(B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(B), first)
        run(B, check_rows=False)
        sketcher = GradientSketcher(model, EXACT)
        run(1)
        sketcher.sketch(lambda: output(model, x), B)
        run(B)


def test_a_layer_that_comes_later_is_checked_as_well():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.late, self.is_late = nn.Linear(8, 8), nn.Linear(8, 8), False

        def forward(self, x):
            x = self.first(x)
            return self.late(x.transpose(0, 1)).transpose(0, 1) if self.is_late else x

    torch.manual_seed(0)
    model, x = Late().double(), data(B, B, 8)
    sketcher = GradientSketcher(model, EXACT)
    sketcher.sketch(lambda: output(model, x), B)
    model.is_late = True
    with pytest.raises(RuntimeError, match=r"module 'late' \(Linear\)"):
        sketcher.sketch(lambda: output(model, x), B)


def test_a_backward_that_runs_only_once_is_told():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.runs = 0
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            ctx.runs += 1
            if ctx.runs > 1:
                raise RuntimeError("gone after one backward\nand more")
            return grad

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return Once.apply(self.layer(x))

    torch.manual_seed(0)
    model, x = Model().double(), data(B, 8)
    with pytest.raises(RuntimeError, match="gone after one backward") as caught:
        features(model, output, x)
    assert "check_rows=False leaves the first one out" in caught.value.__notes__[0]
    expected = single(model, output, x.split(1))
    found = features(model, output, x, check_rows=False)
    assert relative_error(found, expected) < 1e-12
    # one that keeps no graph, as compiled functions may
    kept = lambda: torch._C._autograd._get_current_graph_task_keep_graph()

    def refuses(ctx, grad):
        if kept():
            raise RuntimeError("needs retain_graph=False\nand more")
        return grad

    Once.backward = staticmethod(refuses)
    with pytest.warns(UserWarning, match="rows were not checked, .*: needs retain_graph=False$"):
        found = features(model, output, x)
    assert relative_error(found, expected) < 1e-12
    # one that changes what it keeps: what it multiplied once it multiplies again
    gains = torch.ones(B, 8, dtype=torch.float64)
    Once.backward = staticmethod(lambda ctx, grad: gains.mul_(grad).clone())
    with pytest.warns(UserWarning, match="every other sample has no gradient in the second"):
        features(model, lambda model, x: model(x).sum(1), x)


def test_half_precision_and_what_is_not_finite_pass():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(B, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        features(model, output, x)
    features(copy.deepcopy(model).bfloat16(), output, x.bfloat16())
    x[1] = float("nan")
    assert torch.isnan(features(model, output, x)[1]).any()
    # rows of zeros say nothing
    features(model, lambda model, x: output(model, x) * torch.tensor([0.0, 1, 0, 0]), x.zero_())


class Dropping(nn.Module):
    """Drops in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.first, self.last, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way
        self.drop = nn.Dropout(0.5)
        self.inner = Functional()

    def forward(self, x):
        x = self.first(x)
        x = {"module": self.drop, "functional": self.inner, "none": nn.Identity()}[self.way](x)
        return self.last(x)


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    "way, name", [("module", r"'drop' \(Dropout\)"), ("functional", r"'inner' \(Functional\)")]
)
def test_what_drops_at_random_is_named_once(way, name):
    torch.manual_seed(0)
    model, x = Dropping(way).double(), data(B, 8)
    sketcher = GradientSketcher(model, EXACT)
    with pytest.warns(UserWarning, match=f"^module {name} drew random numbers in training mode"):
        first = sketcher.sketch(lambda: output(model, x), B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = sketcher.sketch(lambda: output(model, x), B)
        # it is as random as it says
        assert relative_error(second, first) > 0.1
        model.eval()
        assert torch.equal(*(features(model, output, x) for _ in range(2)))
        # noise of the caller's is the caller's
        Dropping("none").train()
        model.train().way = "none"
        features(model, lambda model, x: output(model, x + torch.randn_like(x)), x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_randomness_is_looked_for_when_a_model_is_put_in_training_mode():
    torch.manual_seed(0)
    model, x = Dropping("module").double().eval(), data(B, 8)
    sketcher = GradientSketcher(model, EXACT)
    sketcher.sketch(lambda: output(model, x), B)
    model.train()
    with pytest.warns(UserWarning, match="'drop'"):
        sketcher.sketch(lambda: output(model, x), B)
    sketcher = GradientSketcher(model, EXACT)
    with pytest.warns(UserWarning, match="'drop'") as caught, sketcher.batch(B):
        output(model, x).sum().backward()
    assert caught[0].filename == __file__
