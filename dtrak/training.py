"""Training a diffusion model from scratch, resumable bit for bit."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .diffusion import DiffusionModel, hash_model, hash_tensors
from .files import write_atomically
from .outputs import training_target

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: with the data and the initial weights it decides every bit.

    Attributes:
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak of AdamW's learning rate; see `learning_rate_factor` for its course.
        betas: AdamW's decay rates.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm.
        seed: of the order of the data, the timesteps, the noise and dropout.
    """

    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 4e-3
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    max_grad_norm: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values."""
        return asdict(self) | {"betas": list(self.betas)}


def _derive_seed(*key: int | str) -> int:
    """A seed that depends on the key alone, so that no random state need be saved to resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(_derive_seed(*key))


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state of the CPU and ``device`` seeded within, restored after (dropout)."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def batch_indices(step: int, size: int, recipe: Recipe) -> Tensor:
    """Which images a step sees: epochs are permutations laid end to end, and no batch is short.

    Args:
        step: index of the step, from 0.
        size: ``N``, images in the data set.
        recipe: gives the batch size and the seed.

    Returns:
        ``[batch_size]`` int64; a batch across the end of an epoch may hold an image twice.
    """
    first = step * recipe.batch_size
    last = first + recipe.batch_size
    epochs = range(first // size, (last - 1) // size + 1)
    order = torch.cat(
        [torch.randperm(size, generator=_generator(recipe.seed, "order", e)) for e in epochs]
    )
    return order[first - epochs[0] * size :][: recipe.batch_size]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then half a cosine to 0; in (0, 1]."""
    warm_up = math.ceil(steps / 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def save_atomically(state: Any, path: Path) -> None:
    """``torch.save`` through `write_atomically`."""
    # serialised in memory first: torch's own writer hides a full disk behind another error
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def _identity(model: DiffusionModel, images: Tensor, recipe: Recipe) -> dict[str, Any]:
    """Everything that decides the trained weights."""
    schedule = hash_tensors({"betas": model.scheduler.betas})
    return recipe.to_dict() | {
        "images": hash_tensors({"images": images}),
        "initial weights": hash_model(model.unet),
        "noise schedule": f"{schedule} {model.scheduler.config['prediction_type']}",
    }


def _read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
    # a damaged pickle raises whatever its bytes happen to ask for
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} is damaged, or not of this version: delete it to train anew"
        ) from error
    differing = [
        f"{key} ({found.get(key)} there, {value} here)" if key in asdict(Recipe()) else key
        for key, value in identity.items()
        if found.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path} is of another training, which differs in {', '.join(differing)}: "
            "delete it to train anew"
        )
    return state


def train(
    model: DiffusionModel,
    images: Tensor,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: Progress | None = None,
) -> DiffusionModel:
    """Train ``model`` in place on the plain denoising loss.

    The global random state is neither used nor changed. A checkpoint of another training (recipe,
    images, initial weights or noise schedule) is refused rather than continued or overwritten.

    Args:
        model: a freshly initialised model, already on its device.
        images: ``[N, C, H, W]`` float32 in [-1, 1].
        recipe: how.
        checkpoint: where the state is kept while training, so that an interrupted run, called again
            with the same arguments, goes on where it stopped, with the same bits; the caller
            removes it when the model is saved.
        checkpoint_every: steps between checkpoints.
        progress: called with (steps done, steps) after every step.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: there are no images or they are not finite; the loss or its gradient is not
            finite (at which step); the checkpoint is damaged or of another training (what differs).

    Source:
        Ho et al. 2020 (arXiv:2006.11239), algorithm 1; schedule and optimiser as D-TRAK trains
        (arXiv:2311.00500, train_unconditional.py at e2a0c2e).
    """
    if not len(images):
        raise ValueError("images must hold at least one image to train on, got 0")
    if not torch.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity")
    unet, scheduler = model.unet, model.scheduler
    device = next(unet.parameters()).device
    optimiser = torch.optim.AdamW(
        unet.parameters(), betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    start, identity = 0, {}
    if checkpoint is not None:
        identity = _identity(model, images, recipe)
        if checkpoint.is_file():
            state = _read_checkpoint(checkpoint, identity)
            unet.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            start = state["step"]
    unet.train()
    try:
        for step in range(start, recipe.steps):
            batch = images[batch_indices(step, len(images), recipe)].to(device)
            generator = _generator(recipe.seed, "noise", step)
            timesteps = torch.randint(
                model.num_train_timesteps, (len(batch),), generator=generator
            ).to(device)
            noise = torch.randn(batch.shape, generator=generator).to(device)
            noisy = scheduler.add_noise(batch, noise, timesteps)
            with _seeded(device, _derive_seed(recipe.seed, "dropout", step)):
                prediction = unet(noisy, timesteps).sample
            loss = F.mse_loss(prediction, training_target(scheduler, batch, noise, timesteps))
            optimiser.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), recipe.max_grad_norm)
            if not torch.isfinite(loss) or not torch.isfinite(norm):
                raise ValueError(
                    f"the training loss must stay finite, got {loss.item()} with gradient norm "
                    f"{norm.item()} at step {step + 1} of {recipe.steps}: try a learning rate "
                    f"below {recipe.learning_rate}"
                )
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe.steps)
            optimiser.step()
            done = step + 1
            if checkpoint is not None and done % checkpoint_every == 0 and done < recipe.steps:
                save_atomically(
                    {
                        "identity": identity,
                        "step": done,
                        "model": unet.state_dict(),
                        "optimiser": optimiser.state_dict(),
                    },
                    checkpoint,
                )
            if progress is not None:
                progress(done, recipe.steps)
    finally:
        optimiser.zero_grad()
        unet.eval()
    return model
