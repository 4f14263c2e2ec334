"""Which instructions are worth training on for this task? LESS, without a full gradient in memory.

    python examples/less.py

LESS compares the step that Adam would take for a training example with the gradient of a task's
examples, at several checkpoints of a short LoRA training, weighted by their learning rates. Three
things differ from scores of a ridge regression: an `Accumulator` turns every training gradient into
Adam's step before it is projected, features are normalised, and scores are cosines.

Source:
    Xia et al. 2024 (arXiv:2402.04333).
"""

from collections.abc import Callable
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dtrak_kernels import Accumulator, GradientSketcher, Projection, project, project_

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
TASKS = {
    "copy": [(f"copy {a} {b}", f" {a} {b}") for a in WORDS for b in WORDS if a < b],
    "swap": [(f"swap {a} {b}", f" {b} {a}") for a in WORDS for b in WORDS if a < b],
    "count": [(f"count {a * n}", f" {n}") for a in "xyz" for n in range(1, 10)],
}
examples = [example for task in TASKS.values() for example in task]
tasks = [name for name, task in TASKS.items() for _ in task]
letters = sorted({letter for pair in examples for text in pair for letter in text})
BETA1, BETA2, EPS, LEARNING_RATES = 0.9, 0.999, 1e-8, (5e-3, 2e-3)


def losses(model: nn.Module, chosen: list[tuple[str, str]]) -> Tensor:
    """``[B]``: the mean over an answer's own tokens; the question's are not learnt."""
    rows = [torch.tensor([1 + letters.index(letter) for letter in a + b]) for a, b in chosen]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    logits = model(input_ids=tokens, attention_mask=(tokens > 0).long()).logits[:, :-1]
    labels, places = tokens[:, 1:], torch.arange(1, tokens.shape[1], device=device)
    begins = torch.tensor([len(question) for question, _ in chosen], device=device)
    counted = (labels > 0) & (places >= begins[:, None])
    each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (each * counted).sum(1) / counted.sum(1)


class AdamSteps(Accumulator):
    """Projects the step that Adam would take for each gradient, entry by entry.

    Every weight must be used once in a forward, as those of a LoRA are: a step is not linear.

    Args:
        shapes: of the parameters.
        projection: of a dense kind.
        first: ``[P]``, Adam's mean of gradients.
        second: ``[P]``, its mean of their squares.
    """

    def __init__(self, shapes, projection: Projection, first: Tensor, second: Tensor) -> None:
        super().__init__(shapes, projection.proj_dim)
        self.projection, self.first, self.second = projection, first, second

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""
        offset, flat = self.flatten(index, grads, first_row)
        part = slice(offset, offset + flat.shape[1])
        step = adam_step(flat, self.first[part], self.second[part])
        grad_dim = len(self.first)
        project_(step, self.projection, offset=offset, out=out[samples], grad_dim=grad_dim)


def adam_step(grads: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """But for a factor that all samples share, and that a cosine does not see."""
    mean = BETA1 * first + (1 - BETA1) * grads
    square = BETA2 * second + (1 - BETA2) * grads.square()
    return mean / (square.sqrt() + EPS)


def features(sketcher: GradientSketcher, chosen: list[tuple[str, str]]) -> Tensor:
    """``[N, K]``, each of norm 1."""
    parts = [chosen[start : start + 16] for start in range(0, len(chosen), 16)]
    sketches = [
        sketcher.sketch(lambda part=part: losses(sketcher.model, part), num_samples=len(part))
        for part in parts
    ]
    return nn.functional.normalize(torch.cat(sketches), dim=1)


def train(model: nn.Module, chosen: list[tuple[str, str]], rate: float, steps: int) -> Callable:
    """A few steps; gives Adam's two means of a parameter."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(BETA1, BETA2), eps=EPS)
    for _ in range(steps):
        rows = torch.randperm(len(chosen))[:16].tolist()
        optimizer.zero_grad()
        losses(model, [chosen[row] for row in rows]).mean().backward()
        optimizer.step()
    return lambda key: torch.cat([optimizer.state[p][key].flatten() for p in weights])


shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
sizes = {"vocab_size": len(letters) + 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
base = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **shape, **sizes)).to(device)
train(base, examples, 5e-3, 30)
targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
model = get_peft_model(base, LoraConfig(r=4, target_modules=targets)).to(device)

held_out = {name: task[::6] for name, task in TASKS.items()}
pool = [row for row, pair in enumerate(examples) if pair not in held_out[tasks[row]]]
training = [examples[row] for row in pool]
scores = {name: torch.zeros(len(pool), device=device) for name in TASKS}
projection = Projection("rademacher", proj_dim=1024, seed=0)
for rate in LEARNING_RATES:
    model.train()
    state = train(model, training, rate, 20)
    model.eval()
    first, second = state("exp_avg"), state("exp_avg_sq")
    into = partial(AdamSteps, projection=projection, first=first, second=second)
    steps = features(GradientSketcher(model, into=into), training)
    plain = GradientSketcher(model, projection)
    for name, task in held_out.items():
        # the task's gradients as they are, and the mean over its examples
        scores[name] += rate * (steps @ features(plain, task).mean(0))

chosen = [p for p in model.parameters() if p.requires_grad]
grads = torch.autograd.grad(losses(model, training[:1]).sum(), chosen)
alone = adam_step(torch.cat([g.flatten() for g in grads])[None], first, second)
expected = nn.functional.normalize(project(alone, projection), dim=1)
print(f"Adam's step of one example alone: difference {float((steps[:1] - expected).norm()):.1e}")
for name in TASKS:
    best = scores[name].topk(10).indices.tolist()
    count = sum(tasks[pool[row]] == name for row in best)
    print(f"{name}: {count} of the best 10 are of the task, first {training[best[0]]}")
