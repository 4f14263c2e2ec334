"""What a linear datamodelling experiment trains and measures: the part that depends on the model.

`PixelTask` is for models trained from scratch, `text_to_image.TextToImageTask` for the LoRA of
a text-to-image model. Everything else of an experiment (subsets, locks, files, scores) is shared.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...data.samples import Samples
from ...models import load
from ...models.denoiser import Denoiser
from ...models.lora import LORA_FILES
from ...runs.files import write_atomically
from ...training.presets import Preset
from ...training.recipe import Recipe
from ...training.trainer import train
from .options import ExperimentError

Progress = Callable[[int, int], None]
# opens a progress bar with a label, as `console.progress_bar` does
ProgressBar = Callable[[str], AbstractContextManager[Progress]]
TRAIN, VALIDATION, GENERATED = "train", "validation", "generated"
_WEIGHTS = ("model_index.json", LORA_FILES[0])
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
# in the folder of generated queries
_PAINTER_FILE = "drawn_by.json"
_BLOCKS, _BLOCK_BYTES = 16, 2**16


class Journey(NamedTuple):
    """The paths on which some generated queries came about.

    Attributes:
        seeds: B seeds, which are the numbers of the queries.
        predicted: ``[B, S, C, H, W]`` float32 on the CPU: what the model is given, pixels or
            latents, as it predicted them without noise at each of the S steps, the noisiest first.
        captions: B prompts, or None for a model that reads none.
    """

    seeds: list[int]
    predicted: Tensor
    captions: list[str] | None = None


class Task(Protocol):
    """A kind of model, with the data and recipe of one experiment."""

    @property
    def raw(self) -> str:
        """What raw similarities compare: ``"pixels"`` or ``"latents"``."""
        ...

    def deciding(self) -> dict[str, Any]:
        """What decides the numbers besides data and recipe; JSON-serialisable."""
        ...

    def encode(self, device: torch.device, progress_bar: ProgressBar) -> str | None:
        """Make what all models share, where it is missing; its SHA-256, or None for nothing."""
        ...

    def dtype(self, device: torch.device) -> str:
        """Of forward passes when losses and features are made: a key of `choices.DTYPES`.

        Raises:
            ValueError: the device cannot compute in it.
        """
        ...

    def fresh_model(self, seed: int, device: torch.device) -> Denoiser:
        """A model to train, on its device."""
        ...

    def load_model(self, folder: Path) -> Denoiser:
        """The model `save` wrote; it may take the place of the one loaded before."""
        ...

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
        """Train ``model`` in place on the images ``chosen`` ``[N]`` bool, or on all."""
        ...

    def save(self, model: Denoiser, folder: Path, chosen: Tensor | None, recipe: Recipe) -> None:
        """Write a model, trained as `train` was told, into a folder that is not there yet."""
        ...

    def draw(
        self,
        model: Denoiser,
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Draw one picture per seed: (seeds, ``[B, C, H, W]`` in [-1, 1]) batch by batch."""
        ...

    def prompts(self, seeds: Sequence[int]) -> list[str] | None:
        """What the pictures of ``seeds`` are drawn from; None for a model that reads nothing."""
        ...

    def journey_timesteps(self, model: Denoiser) -> list[int]:
        """The S timesteps of `journeys`, the noisiest first."""
        ...

    def journeys(
        self,
        model: Denoiser,
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress | None = None,
    ) -> Iterator[Journey]:
        """Draw the pictures of ``seeds`` again, watching what the model predicts on the way."""
        ...

    def samples(
        self,
        role: str,
        pictures: Samples,
        device: torch.device,
        progress: Progress | None = None,
    ) -> Samples:
        """What a model is given for the pictures of ``role``: `TRAIN`, `VALIDATION`, `GENERATED`.

        Raises:
            ValueError: what is kept of them is incomplete, damaged or of something else.
        """
        ...


def is_saved(folder: Path) -> bool:
    """Whether ``folder`` holds a finished model, whichever task wrote it."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def save_model(model: Denoiser, folder: Path, write: Callable[[Path], None] | None = None) -> None:
    """Save a model so that a killed process leaves none that passes for a whole one.

    Args:
        model: to save, unless one is there.
        folder: where.
        write: writes it into a folder that is not there yet; by default ``model.save``.
    """
    if is_saved(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    (write or model.save)(partial)
    partial.rename(folder)


def sample_weights(folder: Path) -> str:
    """SHA-256 of a sample of a model's weights, which tells whether it was trained anew.

    Of every file of weights the name, the size and 1 MiB in 16 blocks spread over it are read, or
    all of a smaller file: a copy keeps its digest. Training changes every weight, so that another
    training has another one; an edit of single weights between the blocks is not noticed.

    Args:
        folder: of a model, whichever task wrote it.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix not in _WEIGHT_SUFFIXES:
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= _BLOCKS * _BLOCK_BYTES:
                digest.update(opened.read())
                continue
            for block in range(_BLOCKS):
                opened.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def record_painter(folder: Path, weights: str | None) -> None:
    """Note beside the generated queries of the run in ``folder`` which model draws them.

    Args:
        folder: of the run.
        weights: of its full model, as `sample_weights`.
    """
    content = json.dumps({"weights": weights}, indent=1).encode()
    write_atomically(folder / GENERATED / _PAINTER_FILE, content)


def check_painter(folder: Path, weights: str | None) -> None:
    """Refuse generated queries that another full model drew than the one that is there.

    Queries that do not say which model drew them, as those of older versions, are taken for those
    of the model that is there; where the model is gone, they are kept for what they were.

    Args:
        folder: of the run.
        weights: of its full model, as `sample_weights`; None for none.

    Raises:
        ExperimentError: another one drew them, or what they say of it is damaged.
    """
    file = folder / GENERATED / _PAINTER_FILE
    if not file.is_file():
        return
    try:
        drawn_by = json.loads(file.read_text())["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{file} is damaged: delete it if the full model has not been trained anew since, or "
            f"{file.parent} to draw its queries anew"
        ) from error
    if weights in (None, drawn_by):
        return
    made_of = [folder / GENERATED, folder / "latents" / GENERATED, folder / "features"]
    stale = " and ".join(str(place) for place in made_of if place.exists())
    raise ExperimentError(
        f"{file.parent} holds pictures that another full model drew than the one in "
        f"{folder / 'models'}: delete {stale} to draw them anew, which measures all losses again, "
        "or bring that model back"
    )


@dataclass(frozen=True, eq=False)
class PixelTask:
    """An unconditional model, trained from scratch.

    Attributes:
        preset: model and generation recipe.
        data: N training images.
    """

    preset: Preset
    data: Samples

    @property
    def raw(self) -> str:
        """As `Task.raw`."""
        return "pixels"

    def deciding(self) -> dict[str, Any]:
        """Nothing: the preset says it all."""
        return {}

    def encode(self, device: torch.device, progress_bar: ProgressBar) -> str | None:
        """Nothing: the images are all there is."""
        return None

    def dtype(self, device: torch.device) -> str:
        """As `Task.dtype`: single precision, as published."""
        return "float32"

    def fresh_model(self, seed: int, device: torch.device) -> Denoiser:
        """As `Task.fresh_model`."""
        model = self.preset.make_model(seed)
        model.to(device)
        return model

    def load_model(self, folder: Path) -> Denoiser:
        """As `Task.load_model`; always a new one."""
        return load(folder)

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
            ValueError: as `trainer.train`.
        """
        data = self.data if chosen is None else self.data.select(chosen)
        train(
            model,
            data,
            recipe,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )

    def save(self, model: Denoiser, folder: Path, chosen: Tensor | None, recipe: Recipe) -> None:
        """As `Task.save`."""
        model.save(folder)

    def draw(
        self,
        model: Denoiser,
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """As `Task.draw`.

        Raises:
            ValueError: as `Denoiser.draw`.
        """
        model.to(device)
        steps = self.preset.num_inference_steps
        for batch in model.draw(seeds, num_inference_steps=steps, progress=progress):
            yield batch.seeds, batch.images

    def prompts(self, seeds: Sequence[int]) -> list[str] | None:
        """None."""
        return None

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
        """As `Task.journeys`."""
        model.to(device)
        for batch in model.draw(
            seeds,
            num_inference_steps=self.preset.num_inference_steps,
            trajectories=True,
            progress=progress,
        ):
            assert batch.trajectories is not None
            yield Journey(batch.seeds, batch.trajectories)

    def samples(
        self,
        role: str,
        pictures: Samples,
        device: torch.device,
        progress: Progress | None = None,
    ) -> Samples:
        """The pictures themselves."""
        return pictures
