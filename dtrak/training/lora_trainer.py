"""Fine-tuning the adapter of a text-to-image model, resumable bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..models.denoiser import Condition, Denoiser
from ..models.hashing import hash_tensors
from ..runs.choices import CAPTION_DROPOUT
from .recipe import Recipe
from .trainer import (
    Trainer,
    batch_indices,
    dropout_of,
    keyed_generator,
    read_checkpoint,
    save_atomically,
    seeded,
)

DROPOUT_MODULES = "attn"


def describe_training(
    model: Denoiser,
    captions: Sequence[str],
    recipe: Recipe,
    *,
    preset: str | None,
    base: str,
    fingerprint: str,
    rank: int,
    targets: Sequence[str],
    caption_dropout: float,
    mixed_precision: str,
) -> dict[str, Any]:
    """What decides a LoRA, for the record beside it; `dtrak.counterfactual` trains again from it.

    Args:
        model: with the adapter at hand.
        captions: of the N images it is trained on.
        recipe: how.
        preset: where the recipe came from.
        base: folder or hub name of the frozen pipeline.
        fingerprint: of the data set the images are of.
        rank: of the adapter.
        targets: ends of the names of the layers that have one.
        caption_dropout: as `train_lora`.
        mixed_precision: as `accelerate.Accelerator` calls it.

    Returns:
        JSON-serialisable.
    """
    return {
        "data": {"fingerprint": fingerprint, "rows": len(captions)},
        "captions": model.identify_items(captions),
        "steps": recipe.num_steps(len(captions)),
        **describe_model(
            model,
            recipe,
            preset=preset,
            base=base,
            rank=rank,
            targets=targets,
            caption_dropout=caption_dropout,
            mixed_precision=mixed_precision,
        ),
    }


def describe_model(
    model: Denoiser,
    recipe: Recipe,
    *,
    preset: str | None,
    base: str,
    rank: int,
    targets: Sequence[str],
    caption_dropout: float,
    mixed_precision: str,
) -> dict[str, Any]:
    """The part of `describe_training` that needs no images; arguments as there."""
    return {
        "preset": preset,
        "base": base,
        "recipe": recipe.to_dict(),
        "rank": rank,
        "target_modules": list(targets),
        "caption_dropout": caption_dropout,
        "model": model.identity(),
        "schedule": model.process.describe(),
        "mixed_precision": mixed_precision,
    }


def train_lora(
    model: Denoiser,
    posteriors: Tensor,
    captions: Sequence[str],
    recipe: Recipe,
    *,
    caption_dropout: float = CAPTION_DROPOUT,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: Callable[[int, int], None] | None = None,
    accelerator: Accelerator | None = None,
    keep_at: Collection[int] = (),
    keep: Callable[[int], None] | None = None,
) -> Denoiser:
    """Train the adapter of ``model`` in place on the denoising loss of its latents.

    Every step draws latents from the VAE's posterior anew. ``recipe.dropout`` goes to the dropout
    layers of the attention blocks (whose names contain ``attn``) alone. The global random state is
    neither used nor changed. A checkpoint of another training is refused.

    Args:
        model: with a fresh adapter, on its device unless there is an ``accelerator``.
        posteriors: ``[N, 2, 2, C, h, w]`` float32: see `dtrak.features.latents.read_posteriors`.
        captions: N texts.
        recipe: how; without an average of weights.
        caption_dropout: probability that a caption is replaced by the empty one, which is what
            classifier-free guidance needs.
        checkpoint: as in `dtrak.training.trainer.train`, of the adapter alone.
        checkpoint_every: steps between checkpoints.
        progress: called with (steps done, steps) after every step.
        accelerator: as in `dtrak.training.trainer.train`.
        keep_at: numbers of finished steps after which ``keep`` is called.
        keep: called with that number by the process that writes files.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: the model has no adapter; posteriors and captions do not fit each other, are
            none or not finite; a probability is out of range or the recipe asks for an average of
            weights; the loss or its gradient is not finite (at which step); the checkpoint is
            damaged or of another training (what differs).

    Source:
        D-TRAK's train_text_to_image_lora.py at e2a0c2e.
    """
    _check(model, posteriors, captions, recipe, caption_dropout)
    steps = recipe.num_steps(len(captions))
    trainer = _LoraTrainer(model, recipe, caption_dropout, accelerator)
    identity: dict[str, Any] = {}
    start = 0
    if checkpoint is not None:
        identity = trainer.identity(posteriors, captions)
    trainer.prepare()
    if checkpoint is not None and checkpoint.is_file():
        state = read_checkpoint(checkpoint, identity)
        trainer.load_state(state)
        start = state["step"]
    model.module.train()
    dropout = (
        nullcontext()
        if recipe.dropout is None
        else dropout_of(model.module, recipe.dropout, lambda name: DROPOUT_MODULES in name)
    )
    try:
        with dropout:
            for done in range(start + 1, steps + 1):
                trainer.take_step(posteriors, captions, done - 1, steps)
                if keep is not None and done in keep_at and trainer.is_main:
                    keep(done)
                due = done % checkpoint_every == 0 and done < steps
                if checkpoint is not None and due and trainer.is_main:
                    state = {"identity": identity, "step": done, **trainer.state()}
                    save_atomically(state, checkpoint)
                if progress is not None:
                    progress(done, steps)
    finally:
        trainer.release()
    return model


def _check(
    model: Denoiser,
    posteriors: Tensor,
    captions: Sequence[str],
    recipe: Recipe,
    caption_dropout: float,
) -> None:
    if not model.has_adapter:
        raise ValueError("the model must have an adapter to train, got none")
    if posteriors.ndim != 6 or posteriors.shape[1:3] != (2, 2):
        raise ValueError(f"posteriors must be [N, 2, 2, C, h, w], got {list(posteriors.shape)}")
    if not len(posteriors) or len(posteriors) != len(captions):
        raise ValueError(
            "posteriors and captions must be as many, at least one, got "
            f"{len(posteriors)} and {len(captions)}"
        )
    if not torch.isfinite(posteriors).all():
        raise ValueError("posteriors must be finite, got NaN or infinity")
    if not 0 <= caption_dropout <= 1:
        raise ValueError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
    if recipe.ema_decay is not None:
        raise ValueError("ema_decay must be None for an adapter, which is not averaged")


class _LoraTrainer(Trainer):
    """An adapter."""

    def __init__(
        self,
        model: Denoiser,
        recipe: Recipe,
        caption_dropout: float,
        accelerator: Accelerator | None,
    ) -> None:
        chosen = set(model.parameters())
        self.adapter = {n: p for n, p in model.module.named_parameters() if n in chosen}
        super().__init__(model.module, self.adapter.values(), recipe, accelerator)
        self.model, self.caption_dropout = model, caption_dropout

    def identity(self, posteriors: Tensor, captions: Sequence[str]) -> dict[str, Any]:
        """Everything that decides the trained adapter."""
        model = self.model
        precision = "no" if self.accelerator is None else str(self.accelerator.mixed_precision)
        return {
            **self.recipe.to_dict(),
            "caption dropout": self.caption_dropout,
            "latents": hash_tensors({"posteriors": posteriors}),
            "captions": model.identify_items(captions),
            "initial weights": model.identity(),
            "noise schedule": json.dumps(model.process.describe()),
            **({} if precision == "no" else {"mixed precision": precision}),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside its identity and its step."""
        weights = {name: parameter.detach() for name, parameter in self.adapter.items()}
        return {"adapter": weights, **self.optimiser_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(state["adapter"][name])
        self.load_optimiser_state(state)

    def draw(
        self, posteriors: Tensor, captions: Sequence[str], step: int
    ) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """The batch of a step: latents, timesteps, noise and captions, on the CPU."""
        seed, chosen = self.recipe.seed, batch_indices(step, len(captions), self.recipe)
        size = len(chosen)
        mirrored = torch.zeros(size, dtype=torch.int64)
        if self.recipe.flip:
            drawn = torch.rand(size, generator=keyed_generator(seed, "flip", step))
            mirrored = (drawn < 0.5).long()
        posterior = posteriors[chosen, mirrored]
        mean, deviation = posterior.unbind(1)
        spread = torch.randn(mean.shape, generator=keyed_generator(seed, "posterior", step))
        generator = keyed_generator(seed, "noise", step)
        timesteps = self.model.process.draw_timesteps(size, generator)
        noise = torch.randn(mean.shape, generator=generator)
        dropped = torch.rand(size, generator=keyed_generator(seed, "caption", step))
        kept = (dropped >= self.caption_dropout).tolist()
        texts = [captions[i] if keep else "" for i, keep in zip(chosen, kept, strict=True)]
        return mean + deviation * spread, timesteps, noise, texts

    def take_step(self, posteriors: Tensor, captions: Sequence[str], step: int, steps: int) -> None:
        """One optimiser step."""
        process = self.model.process
        latents, timesteps, noise, texts = self.draw(posteriors, captions, step)
        # all processes draw the whole batch, so that their number does not change the training
        rows, weight = self.share(len(latents))
        latents, timesteps, noise = (
            tensor[rows].to(self.device) for tensor in (latents, timesteps, noise)
        )
        # resumed, a step sees other captions for the first time than it did in one run
        condition = condition_apart(self.model, texts[rows], self.device)
        noisy = process.add(latents, noise, timesteps)
        with seeded(self.device, self.dropout_seed(step)):
            prediction = self.model.predict(noisy, timesteps, condition, self.forward)
        target = process.target(latents, noise, timesteps)
        self.descend(process.loss(prediction, target, timesteps) * weight, step, steps)


def condition_apart(model: Denoiser, items: Sequence[Any], device: torch.device) -> Condition:
    """`Denoiser.condition` of each item by itself, so that its bits do not depend on the others."""
    alone = [model.condition([item], device) for item in items]
    return {name: torch.cat([one[name] for one in alone]) for name in alone[0]}
