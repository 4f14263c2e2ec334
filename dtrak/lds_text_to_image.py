"""The LoRA of a text-to-image model as the subject of a linear datamodelling experiment.

The base is loaded once per process and its adapter swapped. Latents of training and validation
images are made once for all models, by ``prepare``; the base, and hashes that tell whether it is
still the same, are in the run's record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .captions import hash_captions
from .data import ImageData
from .diffusion import DiffusionModel, hash_tensors
from .features import Samples, autocast
from .files import write_atomically
from .folders import describe_differences
from .inputs import choose_prompts
from .latents import LatentData, fill_latents, open_latents, read_latents, read_posteriors
from .lds_options import ExperimentError
from .lds_tasks import GENERATED, TRAIN, VALIDATION, Journey, Progress, ProgressBar, join_pictures
from .lora import add_lora, hash_lora, load_lora, remove_lora, save_lora
from .lora_training import describe_training, train_lora
from .options import check_choice
from .presets import LoraRecipe, Preset
from .prompt_paths import follow_prompts
from .recipe import Recipe
from .text_to_image import (
    TRAINING_FILE,
    TextToImageModel,
    drawing_groups,
    drawing_scheduler,
    generate_from_prompts,
    load_text_to_image,
)
from .training import one_process_accelerator

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BASE_PARTS = ("model", "vae", "text_encoder")


def default_precision() -> str:
    """The published precision where there is a GPU, single precision elsewhere."""
    return LoraRecipe().mixed_precision if torch.cuda.is_available() else "no"


def lora_settings(lora: LoraRecipe) -> dict[str, Any]:
    """What a preset says about its LoRA that decides numbers; JSON-serialisable."""
    return {
        "rank": lora.rank,
        "target_modules": list(lora.target_modules),
        "caption_dropout": lora.caption_dropout,
        "guidance_scale": lora.guidance_scale,
    }


def load_base(base: str, recorded: dict[str, str] | None, folder: Path) -> TextToImageModel:
    """A base model, checked to be the one a run was prepared with.

    Args:
        base: folder or hub name.
        recorded: hashes of the one the run was prepared with; None for a new run.
        folder: of the run.

    Raises:
        ExperimentError: it is another one.
        FileNotFoundError, ModelError: as `text_to_image.load_text_to_image`.
    """
    model = load_text_to_image(base)
    differing = "" if recorded is None else describe_differences(recorded, _identify(model))
    if differing:
        raise ExperimentError(
            f"the base model in {base} must be the one {folder} was prepared with: {differing}"
        )
    return model


@dataclass(eq=False)
class TextToImageTask:
    """A LoRA, fine-tuned on images and their captions.

    Attributes:
        preset: with a `LoraRecipe`.
        data: N training images.
        validation: held-out images.
        num_generated: pictures that will be drawn.
        folder: of the run; latents lie in its folder ``latents``.
        base: folder or hub name of the frozen pipeline.
        mixed_precision: of forward passes, as `accelerate.Accelerator` calls it.
        recorded_base: hashes of the base the run was prepared with; None before that.
        recorded_latents: SHA-256 of the latents to train on; None before they are made.
        loaded: the base, where it is loaded already.
    """

    preset: Preset
    data: ImageData
    validation: ImageData
    num_generated: int
    folder: Path
    base: str
    mixed_precision: str
    recorded_base: dict[str, str] | None = None
    recorded_latents: str | None = None
    loaded: TextToImageModel | None = field(default=None, repr=False)
    _posteriors: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("--mixed-precision", self.mixed_precision, PRECISIONS)
        self.captions = {
            TRAIN: self.preset.captions(self.data.labels or []),
            VALIDATION: self.preset.captions(self.validation.labels or []),
            GENERATED: self.prompts(range(self.num_generated)),
        }

    @property
    def raw(self) -> str:
        """As `Task.raw`."""
        return "latents"

    @property
    def lora(self) -> LoraRecipe:
        """The preset's."""
        assert self.preset.lora is not None
        return self.preset.lora

    @property
    def precision(self) -> str:
        """Of forward passes, drawing included: one of `options.DTYPES`."""
        return PRECISIONS[self.mixed_precision]

    def base_model(self) -> TextToImageModel:
        """The base with whatever adapter it has at the moment, loaded at the first call.

        Raises:
            ExperimentError: it is another one than the run was prepared with.
            FileNotFoundError, ModelError: as `text_to_image.load_text_to_image`.
        """
        if self.loaded is None:
            self.loaded = load_base(self.base, self.recorded_base, self.folder)
        return self.loaded

    def deciding(self) -> dict[str, Any]:
        """As `Task.deciding`."""
        model = self.base_model()
        deciding = {
            "base": _identify(model),
            "schedule": model.schedule,
            "lora": lora_settings(self.lora),
            "mixed_precision": self.mixed_precision,
            "captions": {
                role: hash_captions(texts, model.tokenize(texts))
                for role, texts in self.captions.items()
            },
        }
        # as it will be read back: tuples in a schedule are lists then
        read_back: dict[str, Any] = json.loads(json.dumps(deciding))
        return read_back

    def encode(self, device: torch.device, progress_bar: ProgressBar) -> str | None:
        """Make the latents that are missing; the SHA-256 of those to train on.

        Raises:
            ValueError: a side of the images is no multiple of the VAE's factor.
            ExperimentError: the run was prepared before, with latents that differ.
            StoreError: the folder holds other latents, or damaged ones.
        """
        model = self.base_model()
        for role, pictures in ((TRAIN, self.data), (VALIDATION, self.validation)):
            store = open_latents(self._latents_folder(role), model, pictures, flips=role == TRAIN)
            if store.missing():
                with progress_bar(f"latents of {role} images") as progress:
                    fill_latents(store, model, pictures, device, progress=progress)
        self._posteriors = self._read_posteriors()
        digest = hash_tensors({"posteriors": self._posteriors})
        if digest != (self.recorded_latents or digest):
            raise ExperimentError(
                f"{self._latents_folder(TRAIN)} must hold the latents this run was prepared with, "
                "got others: bring them back, or prepare a run in another folder"
            )
        self.recorded_latents = digest
        return digest

    def dtype(self, device: torch.device) -> str:
        """As `Task.dtype`."""
        if self.mixed_precision == "fp16" and device.type == "cpu":
            raise ExperimentError(
                "--device must be a GPU for mixed precision fp16, with which this run was "
                f"prepared, got {device.type}"
            )
        return self.precision

    def fresh_model(self, seed: int, device: torch.device) -> DiffusionModel:
        """As `Task.fresh_model`: the base with a fresh adapter, in place of the one it had."""
        self.dtype(device)
        model = self.base_model()
        remove_lora(model.unet)
        add_lora(model.unet, self.lora.rank, seed=seed)
        model.unet.to(device)
        return model

    def load_model(self, folder: Path) -> DiffusionModel:
        """As `Task.load_model`: the base with that adapter, in place of the one it had.

        Raises:
            LoraError: as `lora.load_lora`.
        """
        model = self.base_model()
        remove_lora(model.unet)
        load_lora(model.unet, folder)
        model.unet.eval()
        return model

    def train(
        self,
        model: DiffusionModel,
        chosen: Tensor | None,
        recipe: Recipe,
        *,
        checkpoint: Path,
        checkpoint_every: int,
        progress: Progress,
    ) -> None:
        """As `Task.train`.

        Raises:
            ValueError: as `lora_training.train_lora`.
        """
        assert isinstance(model, TextToImageModel)
        posteriors = self._checked_posteriors()
        device = next(model.unet.parameters()).device
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            train_lora(
                model,
                posteriors if chosen is None else posteriors[chosen],
                self._captions_of(chosen),
                recipe,
                caption_dropout=self.lora.caption_dropout,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                progress=progress,
                accelerator=one_process_accelerator(self.mixed_precision, device),
            )

    def save(
        self, model: DiffusionModel, folder: Path, chosen: Tensor | None, recipe: Recipe
    ) -> None:
        """Write a LoRA folder as `dtrak.train_lora` does, with the record of its training."""
        assert isinstance(model, TextToImageModel)
        save_lora(model.unet, folder)
        texts = self._captions_of(chosen)
        settings = describe_training(
            model,
            texts,
            recipe,
            preset=self.preset.name,
            base=self.base,
            fingerprint=self.data.fingerprint,
            rank=self.lora.rank,
            caption_dropout=self.lora.caption_dropout,
            mixed_precision=self.mixed_precision,
        )
        # a trained adapter is no part of what it was trained from
        settings["model"] = _identify(model)
        facts = {
            "trained weights": hash_lora(model.unet),
            "dtrak": __version__,
            "torch": torch.__version__,
        }
        content = json.dumps({"settings": settings, "facts": facts}, indent=1)
        write_atomically(folder / TRAINING_FILE, content.encode())

    def draw(
        self,
        model: DiffusionModel,
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """As `Task.draw`: guided by prompts, in small groups.

        Raises:
            ValueError: as `text_to_image.generate_from_prompts`.
        """
        assert isinstance(model, TextToImageModel)
        for group, report in drawing_groups(seeds, progress):
            with self._moved(model, device):
                images = generate_from_prompts(
                    model,
                    self.prompts(group),
                    group,
                    guidance_scale=self.lora.guidance_scale,
                    num_inference_steps=self.preset.num_inference_steps,
                    size=self.preset.size,
                    batch_size=len(group),
                    progress=report,
                )
            yield group, images

    def prompts(self, seeds: Sequence[int]) -> list[str]:
        """As `Task.prompts`: the preset's, from the start again after the last."""
        return choose_prompts(self.preset.prompts(), seeds)

    def journey_timesteps(self, model: DiffusionModel) -> list[int]:
        """As `Task.journey_timesteps`."""
        assert isinstance(model, TextToImageModel)
        scheduler = drawing_scheduler(model)
        scheduler.set_timesteps(self.preset.num_inference_steps)
        timesteps: list[int] = scheduler.timesteps.tolist()
        return timesteps

    def journeys(
        self,
        model: DiffusionModel,
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress | None = None,
    ) -> Iterator[Journey]:
        """As `Task.journeys`: the latents predicted with guidance."""
        assert isinstance(model, TextToImageModel)
        for group, report in drawing_groups(seeds, progress):
            prompts = self.prompts(group)
            with self._moved(model, device):
                predicted = follow_prompts(
                    model,
                    prompts,
                    group,
                    guidance_scale=self.lora.guidance_scale,
                    num_inference_steps=self.preset.num_inference_steps,
                    size=self.preset.size,
                    progress=report,
                )
            yield Journey(group, predicted, prompts)

    def samples(
        self,
        role: str,
        pictures: ImageData,
        device: torch.device,
        progress: Progress | None = None,
    ) -> LatentData:
        """As `Task.samples`: modes of the VAE's posterior, with captions or prompts."""
        model, captions = self.base_model(), self.captions[role]
        if role == TRAIN:
            modes = self._checked_posteriors()[:, 0, 0]
            hashed = hash_captions(captions, model.tokenize(captions))
            return LatentData(pictures, captions, modes, hashed)
        store = open_latents(self._latents_folder(role), model, pictures)
        if store.missing():
            fill_latents(store, model, pictures, device, progress=progress)
        return read_latents(store, model, pictures, captions)

    def join(self, parts: Mapping[str, Samples]) -> LatentData:
        """As `Task.join`."""
        sets = [part for part in parts.values() if isinstance(part, LatentData)]
        captions = [caption for part in sets for caption in part.captions]
        return LatentData(
            join_pictures([part.pictures for part in sets]),
            captions,
            torch.cat([part.images for part in sets]),
            hash_captions(captions, self.base_model().tokenize(captions)),
        )

    def _latents_folder(self, role: str) -> Path:
        return self.folder / "latents" / role

    def _read_posteriors(self) -> Tensor:
        model = self.base_model()
        store = open_latents(self._latents_folder(TRAIN), model, self.data, flips=True)
        if store.missing():
            raise ExperimentError(f"{store.folder} is incomplete: run prepare again")
        return read_posteriors(store, model, self.data)

    def _checked_posteriors(self) -> Tensor:
        """Read once per process."""
        if self._posteriors is None:
            posteriors = self._read_posteriors()
            if hash_tensors({"posteriors": posteriors}) != self.recorded_latents:
                raise ExperimentError(
                    f"{self._latents_folder(TRAIN)} does not hold what prepare wrote: run prepare "
                    "again"
                )
            self._posteriors = posteriors
        return self._posteriors

    def _captions_of(self, chosen: Tensor | None) -> list[str]:
        captions = self.captions[TRAIN]
        if chosen is None:
            return captions
        return [text for text, is_in in zip(captions, chosen.tolist(), strict=True) if is_in]

    def _moved(self, model: TextToImageModel, device: torch.device) -> Any:
        """The U-Net on its device, and its precision as a context."""
        dtype = self.dtype(device)
        model.unet.to(device)
        return autocast(device, dtype)


def _identify(model: TextToImageModel) -> dict[str, str]:
    """Hashes of the frozen parts."""
    identity = model.identity
    return {part: identity[part] for part in _BASE_PARTS}
