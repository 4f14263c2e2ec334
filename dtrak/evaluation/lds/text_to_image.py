"""The LoRA of a text-to-image model as the subject of a linear datamodelling experiment.

The base is loaded once per process and its adapter swapped. Latents of training and validation
images are made once for all models, by ``prepare``; the base, and hashes that tell whether it is
still the same, are in the run's record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...data.captions import choose_prompts
from ...data.rows import InMemory
from ...data.samples import Samples
from ...features.extraction import autocast
from ...features.latents import fill_latents, open_latents, read_latents, read_posteriors
from ...models import load
from ...models.denoiser import Denoiser, Drawn
from ...models.hashing import hash_tensors
from ...runs.choices import TRAINING_FILE, check_choice
from ...runs.files import write_atomically
from ...runs.folders import describe_differences
from ...training.lora_trainer import describe_training, train_lora
from ...training.presets import LoraRecipe, Preset
from ...training.recipe import Recipe
from ...training.trainer import one_process_accelerator
from .options import ExperimentError
from .tasks import GENERATED, TRAIN, VALIDATION, Journey, Progress, ProgressBar

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


def load_base(base: str, recorded: dict[str, str] | None, folder: Path) -> Denoiser:
    """A base model, checked to be the one a run was prepared with.

    Args:
        base: folder or hub name.
        recorded: hashes of the one the run was prepared with; None for a new run.
        folder: of the run.

    Raises:
        ExperimentError: it is another one.
        FileNotFoundError, ModelError: as `dtrak.models.load`.
    """
    model = load(base)
    differing = "" if recorded is None else describe_differences(recorded, model.base_identity())
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
    data: Samples
    validation: Samples
    num_generated: int
    folder: Path
    base: str
    mixed_precision: str
    recorded_base: dict[str, str] | None = None
    recorded_latents: str | None = None
    loaded: Denoiser | None = field(default=None, repr=False)
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
        """Of forward passes, drawing included: a key of `choices.DTYPES`."""
        return PRECISIONS[self.mixed_precision]

    def base_model(self) -> Denoiser:
        """The base with whatever adapter it has at the moment, loaded at the first call.

        Raises:
            ExperimentError: it is another one than the run was prepared with.
            FileNotFoundError, ModelError: as `dtrak.models.load`.
        """
        if self.loaded is None:
            self.loaded = load_base(self.base, self.recorded_base, self.folder)
        return self.loaded

    def deciding(self) -> dict[str, Any]:
        """As `Task.deciding`."""
        model = self.base_model()
        deciding = {
            "base": model.base_identity(),
            "schedule": model.process.describe(),
            "lora": lora_settings(self.lora),
            "mixed_precision": self.mixed_precision,
            "captions": {
                role: model.identify_items(texts) for role, texts in self.captions.items()
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

    def fresh_model(self, seed: int, device: torch.device) -> Denoiser:
        """As `Task.fresh_model`: the base with a fresh adapter, in place of the one it had."""
        self.dtype(device)
        model = self.base_model()
        model.put_adapter(self.lora.rank, seed=seed, targets=self.lora.target_modules)
        model.to(device)
        return model

    def load_model(self, folder: Path) -> Denoiser:
        """As `Task.load_model`: the base with that adapter, in place of the one it had.

        Raises:
            LoraError: as `lora.load_lora`.
        """
        return self.base_model().load_adapter(folder)

    def train(
        self,
        model: Denoiser,
        chosen: Tensor | None,
        recipe: Recipe,
        *,
        checkpoint: Path,
        checkpoint_every: int,
        progress: Progress,
    ) -> None:
        """As `Task.train`.

        Raises:
            ValueError: as `lora_trainer.train_lora`.
        """
        posteriors = self._checked_posteriors()
        device = model.device
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

    def save(self, model: Denoiser, folder: Path, chosen: Tensor | None, recipe: Recipe) -> None:
        """Write a LoRA folder as `dtrak.train_lora` does, with the record of its training."""
        model.save(folder)
        texts = self._captions_of(chosen)
        settings = describe_training(
            model,
            texts,
            recipe,
            preset=self.preset.name,
            base=self.base,
            fingerprint=self.data.conditioned(self.captions[TRAIN]).fingerprint,
            rank=self.lora.rank,
            targets=self.lora.target_modules,
            caption_dropout=self.lora.caption_dropout,
            mixed_precision=self.mixed_precision,
        )
        # a trained adapter is no part of what it was trained from
        settings["model"] = model.base_identity()
        facts = {
            "trained weights": model.identity()["lora"],
            "dtrak": __version__,
            "torch": torch.__version__,
        }
        content = json.dumps({"settings": settings, "facts": facts}, indent=1)
        write_atomically(folder / TRAINING_FILE, content.encode())

    def draw(
        self,
        model: Denoiser,
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """As `Task.draw`: guided by prompts, in small groups.

        Raises:
            ValueError: as `Denoiser.draw`.
        """
        for batch in self._drawn(model, seeds, device, progress=progress):
            yield batch.seeds, batch.images

    def prompts(self, seeds: Sequence[int]) -> list[str]:
        """As `Task.prompts`: the preset's, from the start again after the last."""
        return choose_prompts(self.preset.prompts(), seeds)

    def journey_timesteps(self, model: Denoiser) -> list[int]:
        """As `Task.journey_timesteps`."""
        return model.drawing_timesteps(self.preset.num_inference_steps)

    def journeys(
        self,
        model: Denoiser,
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress | None = None,
    ) -> Iterator[Journey]:
        """As `Task.journeys`: the latents predicted with guidance."""
        for batch in self._drawn(model, seeds, device, trajectories=True, progress=progress):
            assert batch.trajectories is not None
            yield Journey(batch.seeds, batch.trajectories, self.prompts(batch.seeds))

    def _drawn(
        self, model: Denoiser, seeds: Sequence[int], device: torch.device, **how: Any
    ) -> Iterator[Drawn]:
        batches = model.draw(
            seeds,
            self.prompts(seeds),
            guidance_scale=self.lora.guidance_scale,
            num_inference_steps=self.preset.num_inference_steps,
            size=self.preset.size,
            **how,
        )
        while True:
            # the precision is that of drawing, not of what is done with a batch
            with self._moved(model, device):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def samples(
        self,
        role: str,
        pictures: Samples,
        device: torch.device,
        progress: Progress | None = None,
    ) -> Samples:
        """As `Task.samples`: modes of the VAE's posterior, with captions or prompts."""
        model, data = self.base_model(), pictures.conditioned(self.captions[role])
        if role == TRAIN:
            return data.encoded(InMemory(self._checked_posteriors()[:, 0, 0]))
        store = open_latents(self._latents_folder(role), model, data)
        if store.missing():
            fill_latents(store, model, data, device, progress=progress)
        return read_latents(store, model, data)

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

    def _moved(self, model: Denoiser, device: torch.device) -> Any:
        """The U-Net on its device, and its precision as a context."""
        dtype = self.dtype(device)
        model.to(device)
        return autocast(device, dtype)
