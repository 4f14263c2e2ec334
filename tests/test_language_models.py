"""Models of transformers against a float64 loop of single-sample backwards."""

import pytest
import torch
from numerics import relative_error
from test_rows import EXACT, single
from torch import nn
from torch.nn import functional as F

from dtrak_kernels import GradientSketcher, Projection, Whitening, project

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WIDE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
HEADS = {"num_attention_heads": 4}
LAYERS = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def build(name):
    torch.manual_seed(0)
    config, kind = {
        "GPT-2": lambda t: (t.GPT2Config(**LAYERS, **TOKENS), t.GPT2LMHeadModel),
        "Llama": lambda t: (
            t.LlamaConfig(num_key_value_heads=2, **WIDE, **HEADS, **TOKENS),
            t.LlamaForCausalLM,
        ),
        "BERT": lambda t: (
            t.BertConfig(max_position_embeddings=16, num_labels=3, **WIDE, **HEADS, **TOKENS),
            t.BertForSequenceClassification,
        ),
        "Mixtral": lambda t: (
            t.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **WIDE, **HEADS, **TOKENS),
            t.MixtralForCausalLM,
        ),
    }[name](transformers)
    # the default for experts is float32 only
    return kind._from_config(config, experts_implementation="eager").double().eval()


def losses(model, batch):
    """``[B]``: of a classifier, or the mean over the tokens of each sequence."""
    tokens, mask = batch
    logits = model(input_ids=tokens, attention_mask=mask).logits
    if logits.ndim == 2:
        return F.cross_entropy(logits, tokens[:, 0] % 3, reduction="none")
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return (each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def batch_of(B, T):
    torch.manual_seed(B)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, -2:] = 0
    return torch.randint(1, 50, (B, T)), mask


def check(model, B, T, projection=EXACT):
    tokens, mask = batch_of(B, T)
    sketcher = GradientSketcher(model, projection)
    found = sketcher.sketch(lambda: losses(model, (tokens, mask)), B)
    samples = [(tokens[i : i + 1], mask[i : i + 1]) for i in range(B)]
    expected = single(model, losses, samples)
    assert (expected.norm(dim=1) > 0).all()
    if projection.kind != "none":
        expected = project(expected, projection, shapes=sketcher.shapes)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT"])
def test_all_weights(name):
    model = build(name)
    check(model, 4, 7)
    # as many tokens as sequences, and as many heads
    check(model, 4, 4)
    check(model, 3, 6, Projection("sjlt", 256))


@pytest.mark.parametrize(
    "name, targets", [("GPT-2", ["c_attn", "c_fc"]), ("Llama", ["q_proj"]), ("BERT", ["query"])]
)
def test_a_lora(name, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "GPT-2"
    )
    model = peft.get_peft_model(build(name), config).double().eval()
    names = GradientSketcher(model, EXACT).parameter_names
    assert names
    assert all("lora_" in name for name in names)
    check(model, 4, 7)
    check(model, 4, 4)


@pytest.mark.parametrize("kind", ["gradient checkpointing", "embeddings as inputs"])
def test_ways_to_run_one(kind):
    model = build("GPT-2")
    if kind == "gradient checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers does it in training mode alone
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        check(model, 4, 4)
        return
    embed = model.get_input_embeddings()
    tokens, mask = batch_of(4, 6)
    f = lambda m, b: losses(lambda input_ids, **more: m(inputs_embeds=embed(input_ids), **more), b)
    found = GradientSketcher(model, EXACT).sketch(lambda: f(model, (tokens, mask)), 4)
    expected = single(model, f, [(tokens[i : i + 1], mask[i : i + 1]) for i in range(4)])
    assert relative_error(found, expected) < 1e-10


def test_experts():
    """Tokens of all samples in one tensor, sample by sample: several rows for each of the batch."""
    model = build("Mixtral")
    check(model, 4, 7)
    check(model, 4, 4)
    check(model, 2, 5, Projection("kronecker", 256, factor_dim=3))


def test_a_loss_of_the_whole_batch_is_named():
    model, (tokens, mask) = build("GPT-2"), batch_of(4, 7)
    of_all = lambda: model(input_ids=tokens, attention_mask=mask, labels=tokens).loss
    with pytest.raises(ValueError, match=r"got \[\]: a loss averaged over the batch\?"):
        GradientSketcher(model, EXACT).sketch(of_all, 4)
    with pytest.raises(RuntimeError, match=r"the same for all rows.* averaged over the batch\?"):
        GradientSketcher(model, EXACT).sketch(lambda: of_all().expand(4), 4)
    with pytest.raises(
        RuntimeError, match=r"'transformer\.wte' .* num_samples wrong\? .* 4 samples"
    ):
        GradientSketcher(model, EXACT).sketch(lambda: losses(model, (tokens, mask)), 3)


def test_a_model_left_in_training_mode_is_named():
    model, batch = build("GPT-2").train(), batch_of(4, 7)
    sketcher = GradientSketcher(model, EXACT)
    with pytest.warns(
        UserWarning, match=r"'transformer\.drop' \(Dropout\) and \d+ more drew random"
    ):
        sketcher.sketch(lambda: losses(model, batch), 4)


class Flat(nn.Module):
    """GPT-2's kind of linear layer, with and without positions, and used twice."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.first, self.twice, self.last = Conv1D(6, 5), Conv1D(6, 6), Conv1D(3, 6)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        y = self.twice(self.first(x).tanh()).sin()
        return self.last((y + self.twice(y)).mean(1))


PROJECTIONS = [
    EXACT,
    Projection("rademacher", 40, seed=3),
    Projection("sjlt", 256, seed=3),
    Projection("kronecker", 256, seed=3, factor_dim=3),
]


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_the_linear_layer_of_gpt_2_is_streamed(projection):
    torch.manual_seed(0)
    model, x = Flat().double(), torch.randn(8, 4, 5, dtype=torch.float64)
    f = lambda m, x: m(x).tanh().square().mean(1)
    pairs = single(model, f, x.split(1)).unflatten(0, (4, 2)).sum(1)
    sketcher = GradientSketcher(model, projection, rows_per_sample=2, norms=True)
    plan = sketcher.plan(lambda: f(model, x), 4)
    assert {layer.kind for layer in plan.layers} == {"Conv1D"}
    assert not any("recomputed" in layer.kernel for layer in plan.layers)
    assert [layer.positions for layer in plan.layers] == [8, 8, 8, 2]
    assert plan.unknown == ""
    found = sketcher.sketch(lambda: f(model, x), 4)
    assert relative_error(sketcher.grad_norms, pairs.norm(dim=1)) < 1e-12
    expected = pairs
    if projection.kind != "none":
        expected = project(pairs, projection, shapes=sketcher.shapes)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
@pytest.mark.parametrize("kind", ["diagonal", "channels", "lowrank", "kfac"])
@pytest.mark.sweep(1)
def test_the_linear_layer_of_gpt_2_is_whitened(kind, projection):
    torch.manual_seed(0)
    model, x = Flat().double(), torch.randn(8, 4, 5, dtype=torch.float64)
    f = lambda x: model(x).tanh().square().mean(1)
    # the weight is a matrix: its patches are its channels, and any root is served
    batches = [((lambda part=part: f(part)), 4) for part in x.split(4)]
    whitening = Whitening.fit(model, batches, kind=kind, rank=2)
    exact = GradientSketcher(model, EXACT)
    expected = whitening.apply(exact.sketch(lambda: f(x), 8))
    if projection.kind != "none":
        expected = project(expected, projection, shapes=exact.shapes)
    sketcher = GradientSketcher(model, projection, whitening=whitening)
    assert relative_error(sketcher.sketch(lambda: f(x), 8), expected) < 1e-10
