"""Models trained again on part of the data: what every ground truth here is made of.

A subset is a mask of the training images, a seed decides the fresh weights and the order of the
training, a claim keeps two processes from one model, and a state lets a killed one go on: for every
experiment and every kind of model. The experiment's folder holds the states in ``training/``, the
locks in ``locks/`` and, for a model of latents, the latents in ``latents/``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..data.rows import InMemory
from ..data.samples import Samples
from ..features.extraction import autocast
from ..features.latents import fill_latents, open_latents, read_latents, read_posteriors
from ..models.denoiser import Denoiser, Drawn
from ..models.hashing import hash_tensors
from ..runs.choices import NUM_INFERENCE_STEPS
from ..runs.folders import alone_at, describe_differences
from ..training.command import is_saved, save_model
from ..training.recipe import Recipe
from ..training.record import Training
from ..training.start import Start
from ..training.trainer import one_process_accelerator, train

Progress = Callable[[int, int], None]
# opens a progress bar with a label, as `console.progress_bar` does
ProgressBar = Callable[[str], AbstractContextManager[Progress]]
TRAIN = "train"
# of forward passes, by the mixed precision of the training
DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CHECKPOINT_EVERY = 100
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_BLOCKS, _BLOCK_BYTES = 16, 2**16


class RetrainingError(ValueError):
    """A model that cannot be trained again as it was; the message says why."""


@dataclass(frozen=True)
class Drawing:
    """How the pictures of an experiment are drawn.

    Attributes:
        num_inference_steps: DDIM steps.
        guidance_scale: where the model has any; None is its own.
        size: in pixels; None is the model's own.
        dtype: precision, a key of `choices.DTYPES`.
    """

    num_inference_steps: int = NUM_INFERENCE_STEPS
    guidance_scale: float | None = None
    size: int | None = None
    dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        """What decides the pictures; JSON-serialisable."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Retraining:
    """Trains the model of an experiment again, on part of its data, and draws with it.

    Args:
        training: how the model was trained.
        folder: of the experiment.
        drawing: how pictures are drawn.
        data: N training samples, with what the model reads beside each; None reads those that the
            training says.
        base: hashes of the model whose adapter is trained, as recorded; None where it is new.
        latents: SHA-256 of the latents to train on, as recorded; None where they are new.

    Attributes:
        training: as above.
        folder: as above.
        drawing: as above.
        latents: as above, once they are made.
    """

    def __init__(
        self,
        training: Training,
        folder: Path,
        drawing: Drawing,
        *,
        data: Samples | None = None,
        base: dict[str, str] | None = None,
        latents: str | None = None,
    ) -> None:
        self.training, self.folder = training, folder
        self.drawing, self.latents = drawing, latents
        self._recorded, self._data, self._latents_at = base, data, folder / "latents"
        self._base: Denoiser | None = None
        self._like: Denoiser | None = None
        self._posteriors: Tensor | None = None

    @property
    def recipe(self) -> Recipe:
        """That of the model."""
        return self.training.recipe

    @property
    def data(self) -> Samples:
        """N training samples, read once.

        Raises:
            RetrainingError: they are not those the model was trained on.
            FileNotFoundError, ValueError: as `DataSource.load`.
        """
        if self._data is None:
            found = self.training.data.load(self.like())
            chosen = self.training.data.select(found)
            data = found if len(chosen) == len(found) else found.select(chosen)
            self.check_data(data)
            self._data = data
        return self._data

    def check_data(self, data: Samples) -> None:
        """Refuse images that are not those the model was trained on, where that is known.

        Raises:
            RetrainingError: they are others.
        """
        wanted = self.training.fingerprint
        if wanted is not None and data.fingerprint != wanted:
            rows = self.training.rows
            raise RetrainingError(
                f"the model must be trained on the images (and captions or labels) of "
                f"{data.source}, got one trained on {f'{rows:,} ' if rows else ''}others"
            )

    def elsewhere(self, folder: Path) -> Retraining:
        """The same with its locks and states in another folder; the latents stay where they are."""
        other = copy.copy(self)
        other.folder = folder
        return other

    def base(self) -> Denoiser | None:
        """The model whose adapter is trained, loaded once, with whatever adapter it has; or None.

        Raises:
            RetrainingError: it is another one than was recorded.
            FileNotFoundError, ModelError: as `dtrak.models.load`.
        """
        start = self.training.start
        if start.rank is None:
            return None
        if self._base is None:
            self._base = load_base(start, self._recorded, self.folder)
        return self._base

    def like(self) -> Denoiser:
        """A model of the kind that is trained, of whatever weights."""
        base = self.base()
        if base is not None:
            return base
        if self._like is None:
            self._like = self.training.start.make(0)
        return self._like

    def deciding(self) -> dict[str, Any]:
        """What decides the numbers besides data and recipe; JSON-serialisable."""
        base = self.base()
        deciding = {
            "start": self.training.start.to_dict(),
            "schedule": self.like().process.describe(),
            "mixed_precision": self.training.mixed_precision,
            **({} if base is None else {"base": base.base_identity()}),
        }
        # as it will be read back: tuples in a schedule are lists then
        read_back: dict[str, Any] = json.loads(json.dumps(deciding))
        return read_back

    def identity(self, items: dict[str, Any]) -> dict[str, Any]:
        """What decides retrained models and what they draw from ``items``; JSON-serialisable."""
        texts = json.dumps(items).encode()
        return {
            "recipe": self.training.recipe.to_dict(),
            "start": self.training.start.to_dict(),
            "mixed_precision": self.training.mixed_precision,
            "drawing": self.drawing.to_dict(),
            **({"drawn from": hashlib.sha256(texts).hexdigest()} if items else {}),
        }

    def dtype(self, device: torch.device) -> str:
        """Of forward passes when losses and features are made: a key of `choices.DTYPES`.

        Raises:
            RetrainingError: the device cannot compute in it.
        """
        precision = self.training.mixed_precision
        if precision == "fp16" and device.type == "cpu":
            raise RetrainingError(
                "--device must be a GPU for mixed precision fp16, in which this model is trained, "
                f"got {device.type}"
            )
        return DTYPES[precision]

    def prepare(self, device: torch.device, progress_bar: ProgressBar) -> str | None:
        """Make what all trainings share, where it is missing: latents, for a model of latents.

        Returns:
            Their SHA-256, or None.

        Raises:
            ValueError: the pictures do not fit the model.
            RetrainingError: there are others than were recorded.
            StoreError: the folder holds other latents, or damaged ones.
        """
        model = self.like()
        if model.encoding is None:
            return None
        store = open_latents(self._latents_folder(TRAIN), model, self.data, flips=True)
        if store.missing():
            with progress_bar("latents of training images") as progress:
                fill_latents(store, model, self.data, device, progress=progress)
        self._posteriors = self._read_posteriors()
        digest = hash_tensors({"posteriors": self._posteriors})
        if digest != (self.latents or digest):
            raise RetrainingError(
                f"{self._latents_folder(TRAIN)} must hold the latents this run was prepared with, "
                "got others: bring them back, or prepare a run in another folder"
            )
        self.latents = digest
        return digest

    def fresh(self, seed: int, device: torch.device) -> Denoiser:
        """A model to train, on its device; an adapter takes the place of the one there was."""
        self.dtype(device)
        model = self.training.start.make(seed, self.base())
        model.to(device)
        return model

    def load(self, folder: Path) -> Denoiser:
        """A model that was trained; an adapter takes the place of the one there was.

        Raises:
            FileNotFoundError, ValueError: as `dtrak.models.load`.
        """
        return self.training.start.load(folder, self.base())

    def train_once(
        self,
        name: str,
        chosen: Tensor | None,
        seeds: tuple[int, int],
        device: torch.device,
        *,
        is_done: Callable[[], bool],
        finish: Callable[[Denoiser], None],
        keep_at: Sequence[int] = (),
        keep: Callable[[Denoiser, int], None] | None = None,
        progress: Progress | None = None,
    ) -> bool:
        """Train a model unless that is done, or another process is at it.

        A training that was interrupted goes on from its last state.

        Args:
            name: of the model, for its lock and its state.
            chosen: ``[N]`` bool, the images it is trained on; None for all.
            seeds: of its fresh weights, and of its training.
            device: where.
            is_done: whether it is finished.
            finish: makes what is kept of it.
            keep_at: numbers of finished steps after which ``keep`` is called with the model.
            keep: makes what is kept of it on the way.
            progress: called with (steps done, steps) after every step.

        Returns:
            Whether this call finished it.

        Raises:
            ValueError: as `trainer.train`.
        """
        if is_done():
            return False
        with alone_at(self.folder, name) as is_ours:
            if not is_ours or is_done():
                return False
            weights, order = seeds
            model = self.fresh(weights, device)
            data = self._encoded()
            checkpoint = self.folder / "training" / f"{name}.pt"
            checkpoint.parent.mkdir(exist_ok=True)
            with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
                train(
                    model,
                    data if chosen is None else data.select(chosen),
                    replace(self.training.recipe, seed=order),
                    checkpoint=checkpoint,
                    checkpoint_every=_CHECKPOINT_EVERY,
                    progress=progress,
                    accelerator=one_process_accelerator(self.training.mixed_precision, device),
                    keep_at=keep_at,
                    keep=None if keep is None else lambda step: keep(model, step),
                )
            finish(model)
            checkpoint.unlink(missing_ok=True)
            return True

    def save(self, model: Denoiser, folder: Path, chosen: Tensor | None, seed: int) -> None:
        """Write a model with the record of its training, unless it is there.

        Args:
            model: trained by `train_once`.
            folder: where.
            chosen: as there.
            seed: of its weights and its training.
        """
        if is_saved(folder):
            return
        part = self.data if chosen is None else self.data.select(chosen)
        recipe = replace(self.training.recipe, seed=seed)
        training = replace(self.training, recipe=recipe)
        adapts = training.start.rank is not None
        start = model.base_identity() if adapts else None
        identity = model.identity()
        weights = [h for n, h in identity.items() if start is None or n not in start]
        settings = {
            **training.to_dict()["settings"],
            "data": self.training.data.to_dict()
            | {"fingerprint": part.fingerprint, "rows": len(part)},
            **({} if start is None else {"model": start}),
        }
        facts = {
            "trained weights": " ".join(weights),
            "dtrak": __version__,
            "torch": torch.__version__,
            "device": platform.machine(),
        }
        save_model(
            model,
            folder,
            {"settings": settings, "places": training.places, "facts": facts},
        )

    def draw(
        self,
        model: Denoiser,
        seeds: Sequence[int],
        items: Sequence[Any] | None,
        device: torch.device,
        *,
        trajectories: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[Drawn]:
        """Draw one picture per seed, batch by batch, as the experiment draws.

        Raises:
            ValueError: as `Denoiser.draw`.
        """
        how = self.drawing
        model.to(device)
        batches = model.draw(
            seeds,
            items,
            num_inference_steps=how.num_inference_steps,
            guidance_scale=how.guidance_scale,
            size=how.size,
            trajectories=trajectories,
            progress=progress,
        )
        while True:
            # the precision is that of drawing, not of what is done with a batch
            with autocast(device, how.dtype):
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
        """What a model is given for the pictures of ``role``: themselves, or their latents.

        Raises:
            ValueError: what is kept of them is incomplete, damaged or of something else.
        """
        model = self.like()
        if model.encoding is None:
            return pictures
        if role == TRAIN:
            return pictures.encoded(InMemory(self._checked_posteriors()[:, 0, 0]))
        store = open_latents(self._latents_folder(role), model, pictures)
        if store.missing():
            fill_latents(store, model, pictures, device, progress=progress)
        return read_latents(store, model, pictures)

    def _encoded(self) -> Samples:
        """The training samples, with posteriors for a model of latents."""
        if self.like().encoding is None:
            return self.data
        return self.data.encoded(InMemory(self._checked_posteriors()))

    def _latents_folder(self, role: str) -> Path:
        return self._latents_at / role

    def _read_posteriors(self) -> Tensor:
        store = open_latents(self._latents_folder(TRAIN), self.like(), self.data, flips=True)
        if store.missing():
            raise RetrainingError(f"{store.folder} is incomplete: run prepare again")
        return read_posteriors(store, self.like(), self.data)

    def _checked_posteriors(self) -> Tensor:
        """Read once per process."""
        if self._posteriors is None:
            posteriors = self._read_posteriors()
            if self.latents not in (None, hash_tensors({"posteriors": posteriors})):
                raise RetrainingError(
                    f"{self._latents_folder(TRAIN)} does not hold what prepare wrote: run prepare "
                    "again"
                )
            self._posteriors = posteriors
        return self._posteriors


def sample_weights(folder: Path) -> str:
    """SHA-256 of a sample of a model's weights, which tells whether it was trained anew.

    Of every file of weights the name, the size and 1 MiB in 16 blocks spread over it are read, or
    all of a smaller file: a copy keeps its digest. Training changes every weight, so that another
    training has another one; an edit of single weights between the blocks is not noticed.

    Args:
        folder: of a model, of any kind.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix not in _WEIGHT_SUFFIXES:
            continue
        size = file.stat().st_size
        name = file.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")
        digest.update(name + f" {size}\n".encode())
        with file.open("rb") as opened:
            if size <= _BLOCKS * _BLOCK_BYTES:
                digest.update(opened.read())
                continue
            for block in range(_BLOCKS):
                opened.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def load_base(start: Start, recorded: dict[str, str] | None, folder: Path) -> Denoiser:
    """A base model, checked to be the one an experiment was prepared with.

    Args:
        start: of a training of an adapter, which names the model.
        recorded: hashes of the one it was prepared with; None for a new one.
        folder: of the experiment.

    Raises:
        RetrainingError: it is another one.
        FileNotFoundError, ModelError: as `dtrak.models.load`.
    """
    model = start.base()
    differing = "" if recorded is None else describe_differences(recorded, model.base_identity())
    if differing:
        raise RetrainingError(
            f"the base model in {start.model} must be the one {folder} was prepared with: "
            f"{differing}"
        )
    return model
