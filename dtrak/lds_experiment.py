"""Retraining on subsets of the data: what a linear datamodelling score is measured against.

A run folder holds the subsets, the queries, the full model and one model per subset and seed. Model
k, r depends on subset k and seed r alone, so models can be added later without changing earlier
ones, trained by several processes or commands at once, and given up at any moment.

A second family, ``retrain``, has one model on each of further subsets. Datamodels and empirical
influence are fitted to it, and its models make ensembles: no score is judged on them.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .data import ImageData, encode_png, load_data, to_uint8
from .diffusion import DiffusionModel, hash_tensors, load_model
from .features import describe_differences
from .files import write_atomically
from .generation import generate
from .outputs import check_choice
from .presets import SUBSET_FAMILIES, Preset, get_preset
from .training import Recipe, train

FULL = "full"
# of models: those scores are judged on, and those that methods are fitted on
LDS, RETRAIN = "lds", "retrain"
FAMILIES = (LDS, RETRAIN)
_FORMAT = 1
# from this subset on, those of the first family are those of the second
_MOST_SUBSETS = (SUBSET_FAMILIES["retrain"] - SUBSET_FAMILIES["lds-val"]) // 2
# parts of the training at which TracInCP looks at the full model, besides its end
_QUARTERS = 4

Progress = Callable[[int, int], None]


class ExperimentError(ValueError):
    """A run folder that cannot be used; the message says why."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """A prepared run folder.

    Attributes:
        folder: where everything lies.
        preset: data set, model and recipes.
        data: N training images.
        subsets: ``[M, N]`` bool, which of them each subset holds.
        seeds: of the trainings of every subset.
        validation: the first kind of queries: images the model was not trained on.
        num_generated: how many queries of the second kind there are, images the full model draws.
        retrain: ``[R, N]`` bool, subsets of the ``retrain`` family; there may be none.
    """

    folder: Path
    preset: Preset
    data: ImageData
    subsets: Tensor
    seeds: tuple[int, ...]
    validation: ImageData
    num_generated: int
    retrain: Tensor

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps of the full model's training at which its weights are kept, the last excluded."""
        steps = self.preset.recipe.num_steps(len(self.data))
        return tuple(steps * part // _QUARTERS for part in range(1, _QUARTERS))

    def names(self, first: int = 0, last: int | None = None, family: str = LDS) -> list[str]:
        """Names of a family's models on subsets ``first`` to ``last`` (excluded), seed by seed.

        Raises:
            ValueError: there are no such subsets, or no such family.
        """
        check_choice("family", family, FAMILIES)
        if family == RETRAIN and not len(self.retrain):
            raise ExperimentError(
                f"{self.folder} must have a retrain family: run prepare with --num-retrain first"
            )
        R = len(self.subsets if family == LDS else self.retrain)
        if not 0 <= first < R:
            raise ValueError(f"--first must be in [0, {R}), the run's subsets, got {first}")
        if last is not None and not first < last <= R:
            raise ValueError(f"--last must be in [{first + 1}, {R}], got {last}")
        chosen = range(first, R if last is None else last)
        if family == RETRAIN:
            return [f"{RETRAIN}-{subset:03d}-{self.seeds[0]}" for subset in chosen]
        return [f"{subset:03d}-{seed}" for seed in self.seeds for subset in chosen]

    def training_of(self, name: str) -> tuple[Tensor, int]:
        """Which images the model called ``name``, one of `names`, is trained on, and its seed."""
        *family, subset, seed = name.split("-")
        masks = self.retrain if family else self.subsets
        return masks[int(subset)], int(seed)

    def model_folder(self, name: str) -> Path:
        """Where the model called ``name`` lies, trained or not yet."""
        return self.folder / "models" / name

    def is_trained(self, name: str) -> bool:
        """Whether the model called ``name`` is finished."""
        return (self.model_folder(name) / "model_index.json").is_file()

    def load_model(self, name: str = FULL) -> DiffusionModel:
        """A finished model.

        Raises:
            ExperimentError: it is not trained yet.
        """
        if not self.is_trained(name):
            raise ExperimentError(f"model {name!r} of {self.folder} is not trained yet: run train")
        return load_model(self.model_folder(name))

    def load_checkpoints(self) -> list[DiffusionModel]:
        """The full model at every quarter of its training, the end included."""
        names = [_checkpoint_name(step) for step in self.checkpoint_steps]
        return [self.load_model(name) for name in (*names, FULL)]


def prepare(
    folder: Path,
    preset: Preset,
    source: str | None = None,
    *,
    num_subsets: int | None = None,
    num_model_seeds: int | None = None,
    num_validation: int | None = None,
    num_generated: int | None = None,
    num_retrain: int | None = None,
) -> Experiment:
    """Draw the subsets and take the validation queries, or add subsets and seeds to those there.

    Args:
        folder: of the run; made if missing.
        preset: data set, model and recipes.
        source: where the data set lies, as `Preset.load_data` takes it.
        num_subsets: M; by default the preset's. An existing run keeps those it has.
        num_model_seeds: trainings of each subset; by default the preset's.
        num_validation: how many validation images become queries, the first of the draw; by default
            all of them.
        num_generated: how many images the full model will draw as queries; by default the preset's.
        num_retrain: subsets of the ``retrain`` family; by default the preset's. An existing run
            keeps those it has.

    Raises:
        ExperimentError: the folder holds another run (what differs), or something else.
        ValueError: a number is below 1 (0 for the retrain family), there are more subsets than are
            apart from the retrain family, there are fewer validation images than asked for, or the
            preset fine-tunes a text-to-image model.
    """
    counts = {
        "num_subsets": preset.num_subsets if num_subsets is None else num_subsets,
        "num_model_seeds": preset.num_model_seeds if num_model_seeds is None else num_model_seeds,
        "num_generated": preset.num_generated if num_generated is None else num_generated,
    }
    if num_validation is not None:
        counts["num_validation"] = num_validation
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    counts["num_retrain"] = preset.num_retrain if num_retrain is None else num_retrain
    if counts["num_retrain"] < 0:
        raise ValueError(f"num_retrain must be at least 0, got {counts['num_retrain']}")
    if preset.lora is not None:
        raise ValueError(
            f"preset must be of a model trained from scratch, got {preset.name!r}, which "
            "fine-tunes a text-to-image model"
        )
    data = preset.load_data("train", source)
    validation = preset.load_data("validation", source, limit=num_validation)
    if num_validation is not None and len(validation) < num_validation:
        raise ValueError(
            f"num_validation must be at most {len(validation)}, the validation images there are, "
            f"got {num_validation}"
        )
    deciding = {
        "format": _FORMAT,
        "preset": preset.name,
        "data": data.fingerprint,
        "validation": validation.fingerprint,
        "num_generated": counts["num_generated"],
        "num_inference_steps": preset.num_inference_steps,
        "subset_fraction": preset.subset_fraction,
        "recipe": preset.recipe.to_dict(),
    }
    # an existing run is never cut down: what was trained stays part of it
    sizes = {"num_subsets": 0, "num_model_seeds": 0, "num_retrain": 0}
    if folder.exists() and any(path.name != "report" for path in folder.iterdir()):
        found = _read_manifest(folder)
        found["deciding"]["recipe"] = Recipe().to_dict() | found["deciding"]["recipe"]
        differing = describe_differences(found["deciding"], deciding)
        if differing:
            raise ExperimentError(
                f"{folder} holds another run: {differing}. Choose another --output, or delete it"
            )
        # a run prepared before there was a retrain family has none
        sizes = {name: found.get(name, 0) for name in sizes}
    sizes = {name: max(size, counts[name]) for name, size in sizes.items()}
    if sizes["num_retrain"] and sizes["num_subsets"] > _MOST_SUBSETS:
        raise ValueError(
            f"num_subsets must be at most {_MOST_SUBSETS} beside a retrain family, whose subsets "
            f"the next ones would be again, got {sizes['num_subsets']}"
        )
    subsets = preset.subsets(data, sizes["num_subsets"])
    retrain = preset.subsets(data, sizes["num_retrain"], RETRAIN)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "subsets.safetensors", save({"subsets": subsets, RETRAIN: retrain}))
    write_atomically(
        folder / "validation.safetensors",
        save({"images": validation.images}, metadata={"ids": json.dumps(validation.ids)}),
    )
    manifest = {
        "deciding": deciding,
        "source": source,
        "num_validation": len(validation),
        "subsets": hash_tensors({"subsets": subsets}),
        RETRAIN: hash_tensors({RETRAIN: retrain}),
        **sizes,
    }
    write_atomically(folder / "experiment.json", json.dumps(manifest, indent=1).encode())
    return _assemble(folder, preset, data, subsets, retrain, validation, manifest)


def load_experiment(folder: Path) -> Experiment:
    """Open a folder that `prepare` made.

    Raises:
        ExperimentError: it holds no run, a damaged one, or one whose data set has changed.
    """
    manifest = _read_manifest(folder)
    deciding = manifest["deciding"]
    preset = get_preset(deciding["preset"])
    data = preset.load_data("train", manifest["source"])
    validation = preset.load_data(
        "validation", manifest["source"], limit=manifest["num_validation"]
    )
    here = {
        "data": data.fingerprint,
        "validation": validation.fingerprint,
        "recipe": preset.recipe.to_dict(),
    }
    # a field that recipes had not yet when the run was prepared has its default there
    found = {key: deciding[key] for key in here}
    found["recipe"] = Recipe().to_dict() | found["recipe"]
    differing = describe_differences(found, here)
    if differing:
        raise ExperimentError(f"{folder} was prepared with something else: {differing}")
    file = folder / "subsets.safetensors"
    try:
        masks = load_file(file)
        subsets = masks["subsets"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ExperimentError(f"{file} is damaged: run prepare again to draw it anew") from error
    retrain = masks.get(RETRAIN, torch.zeros(0, len(data), dtype=torch.bool))
    found_hashes = hash_tensors({"subsets": subsets}), hash_tensors({RETRAIN: retrain})
    # a run prepared before there was a retrain family has none
    if found_hashes != (manifest["subsets"], manifest.get(RETRAIN, found_hashes[1])):
        raise ExperimentError(f"{file} is not what prepare wrote: run prepare again")
    return _assemble(folder, preset, data, subsets, retrain, validation, manifest)


def _assemble(
    folder: Path,
    preset: Preset,
    data: ImageData,
    subsets: Tensor,
    retrain: Tensor,
    validation: ImageData,
    manifest: dict[str, Any],
) -> Experiment:
    # a subset model never shares the seed of the model it stands in for
    seeds = (seed for seed in itertools.count() if seed != preset.recipe.seed)
    return Experiment(
        folder,
        preset,
        data,
        subsets,
        tuple(itertools.islice(seeds, manifest["num_model_seeds"])),
        validation,
        manifest["deciding"]["num_generated"],
        retrain,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / "experiment.json"
    if not file.is_file():
        raise ExperimentError(f"{folder} must be a folder that prepare made, got no {file.name}")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        known = manifest["deciding"]["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{file} is damaged: prepare the run in another folder") from error
    if known != _FORMAT:
        raise ExperimentError(f"{file} must be of format {_FORMAT}, got {known}")
    return manifest


@contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Try to be the one process that works on something; yields whether it is.

    The operating system lets go of the lock when the process ends, however it ends.

    Args:
        file: of the lock; made if missing, and left there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def train_one(
    experiment: Experiment, name: str, device: torch.device, progress: Progress | None = None
) -> bool:
    """Train the model called ``name`` unless it is finished or another process is at it.

    A training that was interrupted goes on from its last checkpoint. The full model leaves its
    weights at every quarter of the training.

    Args:
        experiment: the run.
        name: `FULL`, or one of `Experiment.names`.
        device: where.
        progress: called with (steps done, steps) after every step.

    Returns:
        Whether this call finished the model.

    Raises:
        ValueError: as `training.train`.
    """
    if experiment.is_trained(name):
        return False
    with claim(experiment.folder / "locks" / f"{name}.lock") as is_ours:
        if not is_ours or experiment.is_trained(name):
            return False
        recipe, data = experiment.preset.recipe, experiment.data
        if name != FULL:
            mask, seed = experiment.training_of(name)
            recipe = replace(recipe, seed=seed)
            data = data.select(mask)
        marks = experiment.checkpoint_steps if name == FULL else ()
        model = experiment.preset.make_model(recipe.seed)
        model.unet.to(device)

        def after_step(done: int, total: int) -> None:
            if done in marks:
                save_model(model, experiment.model_folder(_checkpoint_name(done)))
            if progress is not None:
                progress(done, total)

        # resuming exactly at a mark would pass over it: no checkpoint falls on one
        every = next(e for e in range(100, 1, -1) if all(mark % e for mark in marks))
        checkpoint = experiment.folder / "training" / f"{name}.pt"
        checkpoint.parent.mkdir(exist_ok=True)
        train(
            model,
            data.images,
            recipe,
            checkpoint=checkpoint,
            checkpoint_every=every,
            progress=after_step,
        )
        save_model(model, experiment.model_folder(name))
        checkpoint.unlink(missing_ok=True)
        return True


def _checkpoint_name(step: int) -> str:
    return f"{FULL}-step-{step:06d}"


def save_model(model: DiffusionModel, folder: Path) -> None:
    """Save a model so that a killed process leaves none that passes for a whole one."""
    if (folder / "model_index.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    model.save(partial)
    partial.rename(folder)


def generated_queries(
    experiment: Experiment, device: torch.device, progress: Progress | None = None
) -> ImageData:
    """The images the full model draws, image i from seed i; drawn where they are missing.

    Returns:
        The images as saved, 8 bits a channel.

    Raises:
        ExperimentError: the full model is not trained yet.
    """
    folder = experiment.folder / "generated"
    wanted = [folder / f"{seed:05d}.png" for seed in range(experiment.num_generated)]
    missing = [seed for seed, file in enumerate(wanted) if not file.is_file()]
    if missing:
        model = experiment.load_model()
        model.unet.to(device)
        images = generate(
            model,
            missing,
            num_inference_steps=experiment.preset.num_inference_steps,
            progress=progress,
        )
        folder.mkdir(exist_ok=True)
        for seed, image in zip(missing, images, strict=True):
            write_atomically(wanted[seed], encode_png(to_uint8(image)))
    channels = experiment.data.images.shape[1]
    return load_data(folder, channels=channels, limit=experiment.num_generated)


def query_sets(
    experiment: Experiment, device: torch.device, progress: Progress | None = None
) -> dict[str, ImageData]:
    """The queries by the name of their kind, validation and generated."""
    return {
        "validation": experiment.validation,
        "generated": generated_queries(experiment, device, progress),
    }


def trained_names(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are finished."""
    return [name for name in names if experiment.is_trained(name)]
