"""Training a diffusion model from scratch, resumable bit for bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .diffusion import DiffusionModel
from .outputs import training_target

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; equal recipes and data give equal weights on one device.

    Attributes:
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak of AdamW's learning rate; linear warm-up over the first tenth, cosine to 0.
        betas: AdamW's decay rates.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm.
        seed: of the initial weights, the order of the data, the timesteps and the noise.
    """

    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    max_grad_norm: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values."""
        return asdict(self) | {"betas": list(self.betas)}


def _generator(*key: int) -> torch.Generator:
    """A generator that depends on the key alone, so that no state need be saved to resume."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def batch_indices(step: int, size: int, recipe: Recipe) -> Tensor:
    """Which images step ``step`` sees, ``[batch_size]``: epochs are permutations, batches never short."""
    first = step * recipe.batch_size
    positions = range(first, first + recipe.batch_size)
    epochs = {
        epoch: torch.randperm(size, generator=_generator(recipe.seed, 1, epoch))
        for epoch in range(positions[0] // size, positions[-1] // size + 1)
    }
    return torch.stack([epochs[position // size][position % size] for position in positions])


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then half a cosine to 0, in [0, 1]."""
    warm_up = math.ceil(steps / 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def save_atomically(state: Any, path: Path) -> None:
    """``torch.save`` to a temporary file, then rename: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".partial")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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

    Args:
        model: a freshly initialised model, already on its device.
        images: ``[N, C, H, W]`` float32 in [-1, 1].
        recipe: how.
        checkpoint: where the state is kept while training, so that an interrupted run goes on where it
            stopped, with the same bits; removed by the caller when the model is saved.
        checkpoint_every: steps between checkpoints.
        progress: called with (steps done, steps) after every step.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: there are no images, or the loss is not finite (which step).

    Source:
        Ho et al. 2020 (arXiv:2006.11239), algorithm 1; schedule and optimiser as D-TRAK trains
        (arXiv:2311.00500, train_unconditional.py at e2a0c2e).
    """
    if not len(images):
        raise ValueError("images must hold at least one image to train on, got 0")
    unet, scheduler = model.unet, model.scheduler
    device = next(unet.parameters()).device
    optimiser = torch.optim.AdamW(
        unet.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, recipe.steps)
    )
    start = 0
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["recipe"] == recipe.to_dict():
            unet.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            schedule.load_state_dict(state["schedule"])
            start = state["step"]
    unet.train()
    for step in range(start, recipe.steps):
        batch = images[batch_indices(step, len(images), recipe)].to(device)
        generator = _generator(recipe.seed, 2, step)
        timesteps = torch.randint(
            scheduler.config.num_train_timesteps, (len(batch),), generator=generator
        ).to(device)
        noise = torch.randn(batch.shape, generator=generator).to(device)
        prediction = unet(scheduler.add_noise(batch, noise, timesteps), timesteps).sample
        loss = F.mse_loss(prediction, training_target(scheduler, batch, noise, timesteps))
        if not torch.isfinite(loss):
            raise ValueError(f"the training loss is not finite at step {step}: lower the learning rate")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), recipe.max_grad_norm)
        optimiser.step()
        schedule.step()
        done = step + 1
        if checkpoint is not None and done % checkpoint_every == 0 and done < recipe.steps:
            save_atomically(
                {
                    "recipe": recipe.to_dict(),
                    "step": done,
                    "model": unet.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                },
                checkpoint,
            )
        if progress is not None:
            progress(done, recipe.steps)
    unet.eval()
    return model
