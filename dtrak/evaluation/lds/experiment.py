"""Retraining on subsets of the data: what a linear datamodelling score is measured against.

A run folder holds the subsets, the queries, the full model and one model per subset and seed. Model
k, r depends on subset k and seed r alone, so models can be added later without changing earlier
ones, trained by several processes or commands at once, and given up at any moment.

A second family, ``retrain``, has one model on each of further subsets. Datamodels and empirical
influence are fitted to it, and its models make ensembles: no score is judged on them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ...data.captions import write_captions
from ...data.images import load_data
from ...data.samples import Samples
from ...models.denoiser import Denoiser, Drawn
from ...models.hashing import hash_tensors
from ...runs.choices import check_choice
from ...runs.files import claim as claim
from ...runs.files import picture_name, write_atomically
from ...runs.folders import describe_differences
from ...runs.measure import available_bytes, format_bytes
from ...runs.workers import NAME_BYTES
from ...training.drawing import keep, missing_seeds
from ...training.presets import SUBSET_FAMILIES, Preset, get_preset
from ...training.recipe import Recipe
from .options import (
    FAMILIES,
    FORMAT,
    FULL,
    LDS,
    RETRAIN,
    ExperimentError,
    check_numbers,
    read_manifest,
)
from .tasks import (
    GENERATED,
    VALIDATION,
    PixelTask,
    Progress,
    ProgressBar,
    Task,
    check_painter,
    is_saved,
    record_painter,
    sample_weights,
    save_model,
)
from .text_to_image import PRECISIONS, TextToImageTask, default_precision, load_base, lora_settings

_SUBSETS = "subsets.safetensors"
# from this subset on, those of the first family are those of the second
_MOST_SUBSETS = (SUBSET_FAMILIES["retrain"] - SUBSET_FAMILIES["lds-val"]) // 2
# parts of the training at which TracInCP looks at the full model, besides its end
_QUARTERS = 4


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
        task: what is trained and measured.
    """

    folder: Path
    preset: Preset
    data: Samples
    subsets: Tensor
    seeds: tuple[int, ...]
    validation: Samples
    num_generated: int
    retrain: Tensor
    task: Task

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps of the full model's training at which its weights are kept, the last excluded."""
        steps = self.preset.recipe.num_steps(len(self.data))
        return tuple(steps * part // _QUARTERS for part in range(1, _QUARTERS))

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """Names of the full model at every quarter of its training, the end included."""
        return (*map(_checkpoint_name, self.checkpoint_steps), FULL)

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
        return is_saved(self.model_folder(name))

    def sample_weights(self, name: str = FULL) -> str | None:
        """As `tasks.sample_weights`; None for a model that is not there."""
        return sample_weights(self.model_folder(name)) if self.is_trained(name) else None

    def load_model(self, name: str = FULL) -> Denoiser:
        """A finished model, on the CPU unless it takes the place of one on another device.

        The LoRAs of a run share one base: loading one ends the use of the one before.

        Raises:
            ExperimentError: it is not trained yet.
        """
        if not self.is_trained(name):
            raise ExperimentError(f"model {name!r} of {self.folder} is not trained yet: run train")
        return self.task.load_model(self.model_folder(name))


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
    model: str | None = None,
    mixed_precision: str | None = None,
) -> Experiment:
    """Draw the subsets and take the validation queries, or add subsets and seeds to those there.

    Args:
        folder: of the run; made if missing.
        preset: data set, model and recipes.
        source: where the data set lies, as `Preset.load_data` takes it. This and every number below
            is by default that of the run in the folder, in a new run the preset's.
        num_subsets: M. An existing run keeps those it has.
        num_model_seeds: trainings of each subset. An existing run keeps those it has.
        num_validation: how many validation images become queries, the first of the draw; in a new
            run by default all of them.
        num_generated: how many images the full model will draw as queries.
        num_retrain: subsets of the ``retrain`` family. An existing run keeps those it has.
        model: folder of the base of a preset that fine-tunes; by default the run's own or, in a new
            run, the preset's, by its hub name.
        mixed_precision: of a preset that fine-tunes: ``"no"``, ``"fp16"`` or ``"bf16"``; by default
            the run's own or, in a new run, the published ``"fp16"`` where there is a GPU.

    Raises:
        ExperimentError: the folder holds another run (what differs), or something else.
        ValueError: a number is below 1 (0 for the retrain family), there are more subsets than are
            apart from the retrain family or than fit in memory, more than 100,000 pictures to draw,
            or fewer validation images than asked for; or a model or a precision is given for a
            preset that fine-tunes nothing.
        FileNotFoundError, ModelError: the base, as `dtrak.models.load`, before
            any data is read.
    """
    found = None if _is_new(folder) else read_manifest(folder)
    given = {
        "num_subsets": num_subsets,
        "num_model_seeds": num_model_seeds,
        "num_generated": num_generated,
        "num_retrain": num_retrain,
    }
    # what is not said stays as it is: adding subsets to a run must not add seeds to all of them
    there = {} if found is None else found["deciding"] | found
    counts = {
        name: there.get(name, getattr(preset, name)) if count is None else count
        for name, count in given.items()
    }
    source = there.get("source") if source is None else source
    num_validation = there.get("num_validation") if num_validation is None else num_validation
    if num_validation is not None:
        counts["num_validation"] = num_validation
    check_numbers(counts)
    for option, value in (("--model", model), ("--mixed-precision", mixed_precision)):
        if preset.lora is None and value is not None:
            raise ValueError(
                f"{option} must be left out for {preset.name!r}, which fine-tunes no model, got "
                f"{value!r}"
            )
    if mixed_precision is not None:
        check_choice("--mixed-precision", mixed_precision, PRECISIONS)
    about = {} if preset.lora is None else _choose_base(preset, found, model, mixed_precision)
    # the data takes minutes to read: a base that is refused is refused before
    recorded = None if found is None else found["deciding"].get("base")
    loaded = load_base(about["base"], recorded, folder) if about else None
    data = preset.load_data("train", source)
    validation = preset.load_data("validation", source, limit=num_validation)
    if num_validation is not None and len(validation) < num_validation:
        raise ValueError(
            f"num_validation must be at most {len(validation)}, the validation images there are, "
            f"got {num_validation}"
        )
    task = _make_task(folder, preset, data, validation, counts["num_generated"], about, loaded)
    deciding = {
        "format": FORMAT,
        "preset": preset.name,
        "data": data.fingerprint,
        "validation": validation.fingerprint,
        "num_generated": counts["num_generated"],
        "num_inference_steps": preset.num_inference_steps,
        "subset_fraction": preset.subset_fraction,
        "recipe": preset.recipe.to_dict(),
        **task.deciding(),
    }
    # an existing run is never cut down: what was trained stays part of it
    sizes = {"num_subsets": 0, "num_model_seeds": 0, "num_retrain": 0}
    if found is not None:
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
    _check_memory(len(data), **sizes)
    subsets = preset.subsets(data, sizes["num_subsets"])
    retrain = preset.subsets(data, sizes["num_retrain"], RETRAIN)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _SUBSETS, save({"subsets": subsets, RETRAIN: retrain}))
    manifest = {
        "deciding": deciding,
        "source": source,
        "num_validation": len(validation),
        "subsets": hash_tensors({"subsets": subsets}),
        RETRAIN: hash_tensors({RETRAIN: retrain}),
        **sizes,
        **about,
    }
    _write_manifest(folder, manifest)
    return _assemble(folder, preset, data, subsets, retrain, validation, manifest, task)


def _check_memory(num_train: int, num_subsets: int, num_model_seeds: int, num_retrain: int) -> None:
    needed = (num_subsets + num_retrain) * num_train + num_subsets * num_model_seeds * NAME_BYTES
    available = available_bytes(torch.device("cpu"))
    if needed > available:
        raise ValueError(
            f"num_subsets, num_model_seeds and num_retrain must fit in {format_bytes(available)} "
            f"of memory, got {num_subsets}, {num_model_seeds} and {num_retrain}, which take "
            f"{format_bytes(needed)}"
        )


def encode(experiment: Experiment, device: torch.device, progress_bar: ProgressBar) -> None:
    """Make what all models of a run share: the latents of a preset that fine-tunes.

    Args:
        experiment: as `prepare` returned it.
        device: where.
        progress_bar: opens a progress bar with a label.

    Raises:
        ExperimentError: the run was prepared before, with other latents.
        ValueError: as `tasks.Task.encode`.
    """
    digest = experiment.task.encode(device, progress_bar)
    if digest is not None:
        manifest = read_manifest(experiment.folder)
        _write_manifest(experiment.folder, manifest | {"latents": digest})


def _choose_base(
    preset: Preset,
    found: dict[str, Any] | None,
    model: str | None,
    mixed_precision: str | None,
) -> dict[str, Any]:
    """What a manifest says about the base, from the options and from the one that is there."""
    assert preset.lora is not None
    there = {"base": preset.lora.base_model, "mixed_precision": default_precision()}
    there |= {key: found[key] for key in (*there, "latents") if found and key in found}
    given = {"base": model, "mixed_precision": mixed_precision}
    return there | {key: value for key, value in given.items() if value is not None}


def load_experiment(folder: Path) -> Experiment:
    """Open a folder that `prepare` made.

    Raises:
        ExperimentError: it holds no run, a damaged one, or one whose data set has changed.
    """
    manifest = read_manifest(folder)
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
        **({} if preset.lora is None else {"lora": lora_settings(preset.lora)}),
    }
    # a field that recipes had not yet when the run was prepared has its default there
    found = {key: deciding[key] for key in here}
    found["recipe"] = Recipe().to_dict() | found["recipe"]
    differing = describe_differences(found, here)
    if differing:
        raise ExperimentError(f"{folder} was prepared with something else: {differing}")
    file = folder / _SUBSETS
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
    task = _make_task(folder, preset, data, validation, deciding["num_generated"], manifest)
    return _assemble(folder, preset, data, subsets, retrain, validation, manifest, task)


def _make_task(
    folder: Path,
    preset: Preset,
    data: Samples,
    validation: Samples,
    num_generated: int,
    about: dict[str, Any],
    base: Denoiser | None = None,
) -> Task:
    """What is trained: ``about`` is a manifest, or what `_choose_base` returns."""
    if preset.lora is None:
        return PixelTask(preset, data)
    return TextToImageTask(
        preset,
        data,
        validation,
        num_generated,
        folder,
        about["base"],
        about["mixed_precision"],
        about.get("deciding", {}).get("base"),
        about.get("latents"),
        base,
    )


def _assemble(
    folder: Path,
    preset: Preset,
    data: Samples,
    subsets: Tensor,
    retrain: Tensor,
    validation: Samples,
    manifest: dict[str, Any],
    task: Task,
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
        task,
    )


def _is_new(folder: Path) -> bool:
    """Whether there is no run yet: nothing, or what a killed `prepare` leaves before its record."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()}
    # the record is written last: its partial file is of a prepare that was killed too
    return names <= {"report", _SUBSETS, f"{_SUBSETS}.partial", "experiment.json.partial"}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_atomically(folder / "experiment.json", json.dumps(manifest, indent=1).encode())


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
        ValueError: as `tasks.Task.train`.
    """
    if experiment.is_trained(name):
        return False
    with claim(experiment.folder / "locks" / f"{name}.lock") as is_ours:
        if not is_ours or experiment.is_trained(name):
            return False
        recipe, task = experiment.preset.recipe, experiment.task
        chosen: Tensor | None = None
        if name != FULL:
            chosen, seed = experiment.training_of(name)
            recipe = replace(recipe, seed=seed)
        marks = experiment.checkpoint_steps if name == FULL else ()
        model = task.fresh_model(recipe.seed, device)

        def save(name: str) -> None:
            save_model(
                model,
                experiment.model_folder(name),
                lambda folder: task.save(model, folder, chosen, recipe),
            )

        def after_step(done: int, total: int) -> None:
            if done in marks:
                save(_checkpoint_name(done))
            if progress is not None:
                progress(done, total)

        # resuming exactly at a mark would pass over it: no checkpoint falls on one
        every = next(e for e in range(100, 1, -1) if all(mark % e for mark in marks))
        checkpoint = experiment.folder / "training" / f"{name}.pt"
        checkpoint.parent.mkdir(exist_ok=True)
        task.train(
            model,
            chosen,
            recipe,
            checkpoint=checkpoint,
            checkpoint_every=every,
            progress=after_step,
        )
        save(name)
        checkpoint.unlink(missing_ok=True)
        return True


def _checkpoint_name(step: int) -> str:
    return f"{FULL}-step-{step:06d}"


def generated_queries(
    experiment: Experiment, device: torch.device, progress: Progress | None = None
) -> Samples:
    """The images the full model draws, image i from seed i; drawn where they are missing.

    A model that reads captions draws image i from prompt i, the prompts in ``metadata.jsonl``.

    Returns:
        The images as saved, 8 bits a channel.

    Raises:
        ExperimentError: the full model is not trained yet, or another one than that of the folder
            drew the images that are there.
    """
    folder = experiment.folder / "generated"
    if len(missing_queries(experiment)) < experiment.num_generated:
        # drawn anew, they would take the losses of every model along: that is for the user to say
        check_painter(experiment.folder, experiment.sample_weights())
    if missing_queries(experiment):
        # another device draws other pictures: those that losses were measured of must stay
        with claim(experiment.folder / "locks" / "generated.lock", wait=True):
            _draw_queries(experiment, folder, device, progress)
    return load_data(folder, channels=experiment.data.shape[0], limit=experiment.num_generated)


def _draw_queries(
    experiment: Experiment, folder: Path, device: torch.device, progress: Progress | None
) -> None:
    missing = missing_queries(experiment)
    if not missing:
        return
    model, task = experiment.load_model(), experiment.task
    folder.mkdir(exist_ok=True)
    if len(missing) == experiment.num_generated:
        record_painter(experiment.folder, experiment.sample_weights())
    prompts = task.prompts(range(experiment.num_generated))
    if prompts is not None:
        write_captions(folder, {picture_name(seed): text for seed, text in enumerate(prompts)})
    for seeds, images in task.draw(model, missing, device, progress):
        keep(folder, Drawn(seeds, images, None))


def missing_queries(experiment: Experiment) -> list[int]:
    """Seeds of the generated queries that are not drawn yet."""
    return missing_seeds(experiment.folder / "generated", range(experiment.num_generated))


def query_sets(
    experiment: Experiment, device: torch.device, progress: Progress | None = None
) -> dict[str, Samples]:
    """The queries by the name of their kind, validation and generated, as models are given them."""
    pictures = {
        VALIDATION: experiment.validation,
        GENERATED: generated_queries(experiment, device, progress),
    }
    return {
        role: experiment.task.samples(role, images, device, progress)
        for role, images in pictures.items()
    }


def trained_names(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are finished."""
    return [name for name in names if experiment.is_trained(name)]
