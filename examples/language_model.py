"""Which training texts made a small language model say this? Plain PyTorch, dtrak_kernels alone.

    python examples/language_model.py

A character model is trained on sentences of a few kinds; each query is a sentence of one of them.
A sample is a sequence, its scalar the mean log-likelihood of its characters.
"""

import torch
from torch import Tensor, nn

from dtrak_kernels import GradientSketcher, Projection, RidgeSolver

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

THINGS = ["rain", "snow", "wind", "hail", "fog", "sun"]
KINDS = {
    "weather": [f"the {a} follows the {b}." for a in THINGS for b in THINGS if a != b],
    "sums": [f"{a} plus {b} makes {a + b}." for a in range(1, 7) for b in range(1, 6)],
    "names": [f"call {a}{b}, not {b}{a}!" for a in "klmnop" for b in "aeiou"],
}
texts = [text for kind in KINDS.values() for text in kind]
kinds = [name for name, kind in KINDS.items() for _ in kind]
LENGTH = max(map(len, texts)) + 1
letters = sorted({letter for text in texts for letter in text})


def encode(text: str) -> Tensor:
    """``[LENGTH]`` numbers, 0 being the end."""
    codes = [1 + letters.index(letter) for letter in text]
    return torch.tensor(codes + [0] * (LENGTH - len(codes)))


class Block(nn.Module):
    """Causal attention and a perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, 2, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class LanguageModel(nn.Module):
    """The next character, from those before it."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(letters) + 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(1, LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, len(letters) + 1)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.blocks(self.letters(codes) + self.places[:, : codes.shape[1]]))


def losses(model: nn.Module, codes: Tensor) -> Tensor:
    """``[B]``, the mean over the characters of a sequence."""
    logits = model(codes[:, :-1])
    return nn.functional.cross_entropy(logits.transpose(1, 2), codes[:, 1:], reduction="none").mean(
        1
    )


data = torch.stack([encode(text) for text in texts]).to(device)
model = LanguageModel().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):
    rows = torch.randperm(len(data))[:32]
    optimizer.zero_grad()
    losses(model, data[rows]).mean().backward()
    optimizer.step()

# the position table is shared by all sequences, not a layer's: left out by name
sketcher = GradientSketcher(
    model.eval(),
    Projection("sjlt", proj_dim=2048, seed=0),
    parameters=lambda name, _: name != "places",
)


def features(codes: Tensor) -> Tensor:
    """``[B, 2048]``: per-sample gradients, sketched as the backward makes them."""
    parts = [
        sketcher.sketch(lambda part=part: losses(model, part), num_samples=len(part))
        for part in codes.split(32)
    ]
    return torch.cat(parts)


queries = ["the rain follows the sun.", "3 plus 3 makes 6.", "call ka, not ak!"]
solver = RidgeSolver(features(data))
scores = solver.scores(
    features(torch.stack([encode(text) for text in queries]).to(device)),
    damping=solver.auto_damping(),
)
for query, row in zip(queries, scores, strict=True):
    best = row.topk(5).indices.tolist()
    print(f"{query!r}: {[kinds[i] for i in best]}, first {texts[best[0]]!r}")
