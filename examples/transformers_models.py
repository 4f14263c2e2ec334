"""GPT-2, Llama and BERT of transformers, all weights or a LoRA of PEFT: which training texts count?

    python examples/transformers_models.py

Nothing is downloaded: small models are made from their configurations and trained on sentences of
three kinds. `token_losses` and `class_losses` are what a model of your own needs: one loss per
sample, of a padded batch. Everything else is the same for all of them.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dtrak_kernels import GradientSketcher, Projection, RidgeSolver

device = "cuda" if torch.cuda.is_available() else "cpu"

THINGS = ["rain", "snow", "wind", "hail", "fog", "sun"]
KINDS = {
    "weather": [f"the {a} follows the {b}." for a in THINGS for b in THINGS if a != b],
    "sums": [f"{a} plus {b} makes {a + b}." for a in range(1, 7) for b in range(1, 6)],
    "names": [f"call {a}{b}, not {b}{a}!" for a in "klmnop" for b in "aeiou"],
}
texts = [text for kind in KINDS.values() for text in kind]
kinds = torch.tensor([number for number, kind in enumerate(KINDS.values()) for _ in kind])
letters = sorted({letter for text in texts for letter in text})
SIZES = {"vocab_size": len(letters) + 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def encode(chosen: list[str]) -> tuple[Tensor, Tensor]:
    """Token numbers and attention mask, ``[B, T]`` each: what a tokenizer gives."""
    rows = [torch.tensor([1 + letters.index(letter) for letter in text]) for text in chosen]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return tokens.to(device), (tokens > 0).long().to(device)


def token_losses(model: nn.Module, texts: list[str], _: Tensor) -> Tensor:
    """``[B]``: of each text the mean over its own tokens, never over the batch.

    ``model(..., labels=...).loss`` is one number for all of them and has no per-sample gradient.
    """
    tokens, mask = encode(texts)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    labels, counted = tokens[:, 1:], mask[:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses * counted).sum(1) / counted.sum(1)


def class_losses(model: nn.Module, texts: list[str], labels: Tensor) -> Tensor:
    """``[B]``: how badly each text is classified."""
    tokens, mask = encode(texts)
    logits = model(input_ids=tokens, attention_mask=mask).logits
    return nn.functional.cross_entropy(logits, labels.to(device), reduction="none")


def gpt2() -> PreTrainedModel:
    """Its linear layers are `transformers.pytorch_utils.Conv1D`, its output shares a weight."""
    return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=2, **SIZES))


def llama() -> PreTrainedModel:
    """Grouped queries, rotary positions, and norms that are recomputed."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=32, **shape, **heads, **SIZES))


def bert() -> PreTrainedModel:
    """Positions are looked up once for the batch."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes = {"max_position_embeddings": 32, "num_attention_heads": 4, "num_labels": len(KINDS)}
    return BertForSequenceClassification(BertConfig(**shape, **sizes, **SIZES))


MODELS = {
    "GPT-2": (gpt2, token_losses, ["c_attn"]),
    "Llama": (llama, token_losses, ["q_proj", "v_proj"]),
    "BERT": (bert, class_losses, ["query", "value"]),
}


Losses = Callable[[nn.Module, list[str], Tensor], Tensor]


def train(model: nn.Module, losses: Losses, steps: int) -> None:
    """A few steps on what requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        rows = torch.randperm(len(texts))[:32].tolist()
        optimizer.zero_grad()
        losses(model, [texts[row] for row in rows], kinds[rows]).mean().backward()
        optimizer.step()


def top_kinds(model: nn.Module, losses: Losses) -> tuple[int, int]:
    """How many parameters were attributed, and how many of the best 5 are of their query's kind."""
    # dropout would make every feature another one
    model.eval()
    # what requires a gradient: all weights, or those of the adapter
    sketcher = GradientSketcher(model, Projection("sjlt", proj_dim=2048, seed=0))

    def features(rows: list[int]) -> Tensor:
        parts = [rows[start : start + 16] for start in range(0, len(rows), 16)]
        sketches = [
            sketcher.sketch(
                lambda part=part: losses(model, [texts[row] for row in part], kinds[part]),
                num_samples=len(part),
            )
            for part in parts
        ]
        return torch.cat(sketches)

    queries = [0, 31, 61]
    others = [row for row in range(len(texts)) if row not in queries]
    solver = RidgeSolver(features(others))
    best = solver.scores(features(queries), damping=solver.auto_damping()).topk(5).indices.cpu()
    same = kinds[others][best] == kinds[queries][:, None]
    return sketcher.grad_dim, int(same.sum())


for name, (make, losses, targets) in MODELS.items():
    torch.manual_seed(0)
    model = make().to(device)
    train(model, losses, 60)
    P, same = top_kinds(model, losses)
    print(f"{name}, all weights: P = {P:,}, {same} of 15 texts are of their query's kind")
    # GPT-2's linear layers have their weights the other way round
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "GPT-2")
    adapted = get_peft_model(model, config)
    train(adapted, losses, 20)
    P, same = top_kinds(adapted, losses)
    print(f"{name}, LoRA: P = {P:,}, {same} of 15 texts are of their query's kind")
