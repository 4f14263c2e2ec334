"""How the model of a run was trained, so that it can be trained again on fewer images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from ...data.images import to_uint8
from ...data.samples import Samples
from ...features.extraction import autocast
from ...features.latents import fill_latents, open_latents, read_posteriors
from ...models import load
from ...models.denoiser import Denoiser
from ...models.lora import lora_weights
from ...models.unet import digits_model
from ...runs.choices import (
    GUIDANCE_SCALE,
    LORA_TARGETS,
    NUM_INFERENCE_STEPS,
    TRAINING_FILE,
)
from ...runs.console import progress_bar
from ...runs.files import picture_seed
from ...runs.results import Attribution, Inputs
from ...training.drawing import draw_all
from ...training.lora_trainer import train_lora
from ...training.presets import get_preset
from ...training.recipe import Recipe
from ...training.trainer import one_process_accelerator, train
from .options import CounterfactualError

Progress = Callable[[int, int], None]


class Training(Protocol):
    """Trains the model of a run again, and draws with it."""

    @property
    def recipe(self) -> Recipe:
        """That of the run."""
        ...

    def prepare(self, folder: Path, device: torch.device, console: Console) -> None:
        """Make what all trainings share, in the folder of the experiment."""
        ...

    def retrain(
        self,
        kept: Tensor,
        seeds: tuple[int, int],
        folder: Path,
        device: torch.device,
        checkpoint: Path,
        progress: Progress | None,
    ) -> Denoiser:
        """A model trained on the images ``kept`` ``[N]`` bool; seeds of weights and training."""
        ...

    def draw(self, model: Denoiser, query_ids: Sequence[str]) -> Tensor:
        """Queries of the run drawn again, each from its seed: ``[Q, C, H, W]`` uint8."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the retrained models and their pictures, JSON-serialisable."""
        ...


@dataclass(frozen=True, eq=False)
class PixelTraining:
    """An unconditional model, trained from scratch.

    Attributes:
        recipe: that of the run.
        make_model: a fresh model from the seed of its initial weights.
        data: N training samples.
        items: what each query was drawn from, by its id, for a model that reads anything.
        num_inference_steps: DDIM steps of a picture.
        mixed_precision: as `accelerate.Accelerator` calls it.
    """

    recipe: Recipe
    make_model: Callable[[int], Denoiser]
    data: Samples
    items: dict[str, Any] = field(default_factory=dict)
    num_inference_steps: int = NUM_INFERENCE_STEPS
    mixed_precision: str = "no"

    def prepare(self, folder: Path, device: torch.device, console: Console) -> None:
        """Nothing: the images are all there is."""

    def retrain(
        self,
        kept: Tensor,
        seeds: tuple[int, int],
        folder: Path,
        device: torch.device,
        checkpoint: Path,
        progress: Progress | None,
    ) -> Denoiser:
        """As `Training.retrain`.

        Raises:
            ValueError: as `trainer.train`.
        """
        model = self.make_model(seeds[0])
        model.to(device)
        train(
            model,
            self.data.select(kept),
            replace(self.recipe, seed=seeds[1]),
            checkpoint=checkpoint,
            progress=progress,
            accelerator=one_process_accelerator(self.mixed_precision, device),
        )
        return model

    def draw(self, model: Denoiser, query_ids: Sequence[str]) -> Tensor:
        """As `Training.draw`."""
        items = [self.items[query] for query in query_ids] if self.items else None
        steps = self.num_inference_steps
        return to_uint8(
            draw_all(model, seeds_of(query_ids), items=items, num_inference_steps=steps)
        )

    def identity(self) -> dict[str, Any]:
        """As `Training.identity`."""
        return {
            "recipe": self.recipe.to_dict(),
            "num_inference_steps": self.num_inference_steps,
            "mixed_precision": self.mixed_precision,
        }


@dataclass(frozen=True, eq=False)
class LoraTraining:
    """A text-to-image model whose LoRA is fine-tuned anew.

    Attributes:
        recipe: that of the run.
        base: folder or hub name of the frozen pipeline.
        rank: of the LoRA.
        data: N training images.
        captions: theirs.
        prompts: by the id of a query.
        caption_dropout: see `lora_trainer.train_lora`.
        mixed_precision: as `accelerate.Accelerator` calls it.
        guidance_scale: of the pictures.
        size: of the pictures, in pixels; None is the model's own.
        num_inference_steps: DDIM steps of a picture.
        drawn_in: precision of drawing, a key of `choices.DTYPES`: that of the run's own pictures,
            or the precision would change them too.
        targets: ends of the names of the layers that have a LoRA.
    """

    recipe: Recipe
    base: str
    rank: int
    data: Samples
    captions: list[str]
    prompts: dict[str, str]
    caption_dropout: float
    mixed_precision: str = "no"
    guidance_scale: float = GUIDANCE_SCALE
    size: int | None = None
    num_inference_steps: int = NUM_INFERENCE_STEPS
    drawn_in: str = "float32"
    targets: tuple[str, ...] = LORA_TARGETS

    def prepare(self, folder: Path, device: torch.device, console: Console) -> None:
        """Encode the training images once for all trainings."""
        model = load(self.base)
        store = open_latents(folder / "latents", model, self.data, flips=True)
        if store.missing():
            with progress_bar(console, "latents of training images") as progress:
                fill_latents(store, model, self.data, device, progress=progress)

    def retrain(
        self,
        kept: Tensor,
        seeds: tuple[int, int],
        folder: Path,
        device: torch.device,
        checkpoint: Path,
        progress: Progress | None,
    ) -> Denoiser:
        """As `Training.retrain`.

        Raises:
            ValueError: as `lora_trainer.train_lora`.
        """
        model = load(self.base).put_adapter(self.rank, seed=seeds[0], targets=self.targets)
        store = open_latents(folder / "latents", model, self.data, flips=True)
        posteriors = read_posteriors(store, model, self.data)[kept]
        model.to(device)
        return train_lora(
            model,
            posteriors,
            [text for text, is_kept in zip(self.captions, kept.tolist(), strict=True) if is_kept],
            replace(self.recipe, seed=seeds[1]),
            caption_dropout=self.caption_dropout,
            checkpoint=checkpoint,
            progress=progress,
            accelerator=one_process_accelerator(self.mixed_precision, device),
        )

    def draw(self, model: Denoiser, query_ids: Sequence[str]) -> Tensor:
        """As `Training.draw`."""
        with autocast(model.device, self.drawn_in):
            pictures = draw_all(
                model,
                seeds_of(query_ids),
                items=[self.prompts[query] for query in query_ids],
                guidance_scale=self.guidance_scale,
                num_inference_steps=self.num_inference_steps,
                size=self.size,
            )
        return to_uint8(pictures)

    def identity(self) -> dict[str, Any]:
        """As `Training.identity`."""
        texts = json.dumps([self.captions, self.prompts]).encode()
        return {
            "recipe": self.recipe.to_dict(),
            "num_inference_steps": self.num_inference_steps,
            "mixed_precision": self.mixed_precision,
            "rank": self.rank,
            "target_modules": list(self.targets),
            "caption_dropout": self.caption_dropout,
            "guidance_scale": self.guidance_scale,
            "size": self.size,
            "captions and prompts": hashlib.sha256(texts).hexdigest(),
            **({} if self.drawn_in == "float32" else {"drawn in": self.drawn_in}),
        }


def seeds_of(query_ids: Sequence[str]) -> list[int]:
    """The seed each generated picture was drawn from, which its name is."""
    return [picture_seed(query) for query in query_ids]


def find_training(run: Attribution, inputs: Inputs, preset: str | None) -> Training:
    """How the model of a run was trained, from what its trainer wrote down or from a preset.

    Args:
        run: of `dtrak.attribute`, with generated queries.
        inputs: its model and images.
        preset: name of the preset that trained it; None where that is written down.

    Raises:
        CounterfactualError: it is not written down, it was trained on other images or captions, or
            the recipe is for another model.
        ValueError: the preset is unknown.
    """
    if run.options.lora is not None:
        return _find_lora_training(run, inputs, preset)
    data, queries = inputs.train, inputs.queries
    items = dict(zip(queries.ids, queries.conditions or [], strict=False))
    recipe = run.deciding["model"].get("recipe")
    if preset is not None:
        found = get_preset(preset)
        training = PixelTraining(
            found.recipe, found.make_model, data, items, found.num_inference_steps
        )
    elif recipe is not None:
        training = PixelTraining(_read_recipe(recipe), digits_model, data, items)
    else:
        note = _read_note(run, data)
        training = PixelTraining(
            _read_recipe(note["recipe"]),
            get_preset(note["preset"]).make_model,
            data,
            items,
            mixed_precision=note.get("mixed_precision", "no"),
        )
    fresh, own = training.make_model(0), inputs.model
    if _shapes(fresh) != _shapes(own) or fresh.process.describe() != own.process.describe():
        raise CounterfactualError(
            f"the recipe must be that of the model of {run.folder}, got one for a model of other "
            "weights or noise"
        )
    return training


def find_preset(run: Attribution, preset: str | None) -> str | None:
    """Name of the preset a run belongs to: as given, as the run or its model's trainer says."""
    given = preset or run.options.preset
    if given is not None:
        return given
    try:
        note = json.loads(_note_file(run).read_text())
        found = note["settings"]["preset"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _note_file(run: Attribution) -> Path:
    """Where `dtrak.train` or `dtrak.train_lora` wrote how it trained what the run explains."""
    if run.options.lora is None:
        return run.model_folder / TRAINING_FILE
    place = Path(run.options.lora)
    return (place if place.is_dir() else place.parent) / TRAINING_FILE


def _find_lora_training(run: Attribution, inputs: Inputs, preset: str | None) -> LoraTraining:
    options, model = run.options, inputs.model
    assert options.lora is not None
    assert options.model is not None
    data, captions = inputs.train, inputs.train.conditions or []
    if preset is None:
        note = _read_note(run, data)
        if note["captions"] != model.identify_items(captions):
            raise CounterfactualError(
                f"the LoRA {options.lora} must be trained with the captions of {run.folder}, got "
                "others"
            )
        recipe, rank = _read_recipe(note["recipe"]), note["rank"]
        targets = tuple(note["target_modules"])
        dropout, precision = note["caption_dropout"], note["mixed_precision"]
    else:
        found = get_preset(preset)
        if found.lora is None:
            raise CounterfactualError(
                f"the recipe must be that of the LoRA of {run.folder}, got preset {preset!r}, "
                "which fine-tunes nothing"
            )
        recipe, rank, targets = found.recipe, found.lora.rank, found.lora.target_modules
        dropout, precision = found.lora.caption_dropout, found.lora.mixed_precision
    ranks = {min(weight.shape[:2]) for weight in lora_weights(model.module).values()}
    if ranks != {rank}:
        raise CounterfactualError(
            f"the recipe must be that of the LoRA of {run.folder}, got one of rank {rank} for "
            f"{sorted(ranks)}"
        )
    queries = inputs.queries
    return LoraTraining(
        recipe,
        options.model,
        rank,
        data,
        captions,
        dict(zip(queries.ids, queries.conditions or [], strict=True)),
        dropout,
        precision,
        GUIDANCE_SCALE if options.guidance_scale is None else options.guidance_scale,
        options.resolution,
        targets=targets,
    )


def _read_note(run: Attribution, data: Samples) -> dict[str, Any]:
    """What `dtrak.train` or `dtrak.train_lora` wrote beside what it trained."""
    file = _note_file(run)
    if not file.is_file():
        raise CounterfactualError(
            f"--preset must say how the model of {run.folder} was trained, got none: no "
            f"{file.name} lies beside it"
        )
    try:
        note: dict[str, Any] = json.loads(file.read_text())["settings"]
        trained_on = note["data"]["fingerprint"], note["data"]["rows"]
        _read_recipe(note["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise CounterfactualError(
            f"{file} is damaged: say with --preset how the model was trained"
        ) from error
    if trained_on != (data.fingerprint, len(data)):
        raise CounterfactualError(
            f"the model in {file.parent} must be trained on the images of {run.folder}, got one "
            "trained on others"
        )
    return note


def _read_recipe(values: dict[str, Any]) -> Recipe:
    try:
        return Recipe(**{**values, "betas": tuple(values["betas"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CounterfactualError(
            "the recipe the model was trained with must be one of this version: say with --preset "
            "how it was trained"
        ) from error


def _shapes(model: Denoiser) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
