"""Retraining on subsets of the data: what a linear datamodelling score is measured against.

A run folder holds the subsets, the queries, the full model and one model per subset and seed. Model
k, r depends on subset k and seed r alone, so models can be added later without changing earlier
ones, trained by several processes or commands at once, and given up at any moment.

A second family, ``retrain``, has one model on each of further subsets. Datamodels and empirical
influence are fitted to it, and its models make ensembles: no score is judged on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ...data.samples import Samples
from ...models.denoiser import Denoiser
from ...models.hashing import hash_tensors
from ...runs.choices import PRECISIONS, check_choice
from ...runs.files import write_atomically
from ...runs.folders import describe_differences
from ...runs.measure import available_bytes, format_bytes
from ...runs.workers import NAME_BYTES
from ...training.command import is_saved
from ...training.presets import SUBSET_FAMILIES, Preset, get_preset
from ..retraining import Progress, ProgressBar, Retraining, sample_weights
from ..subject import (
    NUM_VALIDATION,
    Subject,
    Trained,
    default_precision,
    subject_of_preset,
)
from .options import (
    EXPERIMENT,
    FAMILIES,
    FULL,
    LDS,
    RETRAIN,
    VALIDATION,
    ExperimentError,
    check_numbers,
    read_manifest,
)

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
        subject: what is trained again.
        retraining: trains it again.
        subsets: ``[M, N]`` bool, which of the N training images each subset holds.
        seeds: of the trainings of every subset.
        validation: the first kind of queries: images the model was not trained on; None for none.
        num_generated: how many queries of the second kind there are, images the full model draws.
        retrain: ``[R, N]`` bool, subsets of the ``retrain`` family; there may be none.
    """

    folder: Path
    subject: Subject
    retraining: Retraining
    subsets: Tensor
    seeds: tuple[int, ...]
    validation: Samples | None
    num_generated: int
    retrain: Tensor

    @property
    def data(self) -> Samples:
        """N training images, with what the model reads beside each."""
        return self.retraining.data

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps of the full model's training at which its weights are kept, the last excluded."""
        if self.subject.checkpoints is not None:
            return self.subject.checkpoints
        steps = self.retraining.recipe.num_steps(len(self.data))
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
        """As `retraining.sample_weights`; None for a model that is not there."""
        return sample_weights(self.model_folder(name)) if self.is_trained(name) else None

    def load_model(self, name: str = FULL) -> Denoiser:
        """A finished model, on the CPU unless it takes the place of one on another device.

        The LoRAs of a run share one base: loading one ends the use of the one before.

        Raises:
            ExperimentError: it is not trained yet.
        """
        if not self.is_trained(name):
            raise ExperimentError(f"model {name!r} of {self.folder} is not trained yet: run train")
        return self.retraining.load(self.model_folder(name))


def prepare(
    folder: Path,
    preset: Preset,
    source: str | None = None,
    *,
    model: str | None = None,
    mixed_precision: str | None = None,
    **numbers: int | None,
) -> Experiment:
    """Draw the subsets and take the validation queries, or add subsets and seeds to those there.

    Args:
        folder: of the run; made if missing.
        preset: data set, model and recipes.
        source: where the data set lies, as `Preset.load_data` takes it. This and every number below
            is by default that of the run in the folder, in a new run the preset's.
        model: folder of the base of a preset that fine-tunes; by default the run's own or, in a new
            run, the preset's, by its hub name.
        mixed_precision: of a preset that fine-tunes: ``"no"``, ``"fp16"`` or ``"bf16"``; by default
            the run's own or, in a new run, the published ``"fp16"`` where there is a GPU.
        numbers: as `prepare_subject`.

    Raises:
        ExperimentError: the folder holds another run (what differs), or something else.
        ValueError: as `prepare_subject`; or a model or a precision is given for a preset that
            fine-tunes nothing.
        FileNotFoundError, ModelError: the base, as `dtrak.models.load`, before any data is read.
    """
    for option, value in (("--model", model), ("--mixed-precision", mixed_precision)):
        if preset.lora is None and value is not None:
            raise ValueError(
                f"{option} must be left out for {preset.name!r}, which fine-tunes no model, got "
                f"{value!r}"
            )
    if mixed_precision is not None:
        check_choice("--mixed-precision", mixed_precision, PRECISIONS)
    found = _read_existing(folder)
    precision = default_precision(preset)
    if found is not None and found["settings"]["name"] == preset.name:
        there = Subject.from_dict(found["subject"]).training
        source, model = source or there.data.source, model or there.start.model
        precision = there.mixed_precision
    subject = subject_of_preset(preset, source, model, mixed_precision or precision)
    defaults = {name: getattr(preset, name) for name in subject.numbers}
    return prepare_subject(folder, subject, defaults, **numbers)


def prepare_run(folder: Path, subject: Subject, trained: Trained, **numbers: Any) -> Experiment:
    """The same for a model of one's own, which is the full model of the experiment.

    Args:
        folder: as `prepare`.
        subject: of the model.
        trained: the model.
        numbers: as `prepare_subject`.

    Raises:
        ExperimentError, ValueError: as `prepare_subject`, or the model is not that of the run.
    """
    experiment = prepare_subject(folder, subject, subject.numbers, **numbers)
    _take_model(experiment, FULL, trained.weights, trained.load())
    kept = trained.checkpoints()
    for step in subject.kept:
        model = experiment.retraining.load(kept[step])
        _take_model(experiment, _checkpoint_name(step), kept[step], model)
    return experiment


def _take_model(experiment: Experiment, name: str, place: Path, model: Denoiser) -> None:
    """Copy a model into the experiment, or refuse one that is another than the one there."""
    folder = experiment.model_folder(name)
    if is_saved(folder):
        wanted = model.identity()
        if experiment.load_model(name).identity() != wanted:
            raise ExperimentError(
                f"{folder} must be the model in {place}, got another: choose another --output"
            )
        return
    experiment.retraining.save(model, folder, None, experiment.retraining.recipe.seed)


def prepare_subject(
    folder: Path,
    subject: Subject,
    defaults: Mapping[str, int],
    *,
    num_subsets: int | None = None,
    num_model_seeds: int | None = None,
    num_validation: int | None = None,
    num_generated: int | None = None,
    num_retrain: int | None = None,
) -> Experiment:
    """Draw the subsets and take the validation queries of any experiment, or add to those there.

    Args:
        folder: of the run; made if missing.
        subject: what is trained again.
        defaults: numbers of a new run where nothing is said; an existing one keeps its own.
        num_subsets: M. An existing run keeps those it has.
        num_model_seeds: trainings of each subset. An existing run keeps those it has.
        num_validation: how many validation images become queries, the first of the draw; in a new
            run of a preset by default all of them.
        num_generated: how many images the full model will draw as queries.
        num_retrain: subsets of the ``retrain`` family. An existing run keeps those it has.

    Raises:
        ExperimentError: the folder holds another run (what differs), or something else.
        ValueError: a number is below 1 (0 for the retrain family), there are more subsets than are
            apart from the retrain family or than fit in memory, more than 100,000 pictures to draw,
            or fewer validation images than asked for.
    """
    found = _read_existing(folder)
    given = {
        "num_subsets": num_subsets,
        "num_model_seeds": num_model_seeds,
        "num_generated": num_generated,
        "num_retrain": num_retrain,
    }
    # what is not said stays as it is: adding subsets to a run must not add seeds to all of them
    there = {} if found is None else found["settings"] | found
    counts = {
        name: there.get(name, defaults[name]) if count is None else count
        for name, count in given.items()
    }
    num_validation = there.get("num_validation") if num_validation is None else num_validation
    asked = {} if not num_validation else {"num_validation": num_validation}
    check_numbers({"num_validation": num_validation, **counts} if found is None else counts | asked)
    recorded = None if found is None else found["settings"].get("base")
    latents = None if found is None else found.get("latents")
    retraining = Retraining(
        subject.training, folder, subject.drawing, base=recorded, latents=latents
    )
    # the data takes minutes to read: a base that is refused is refused before
    model = retraining.like()
    drawn_from = subject.items_of(model, range(counts["num_generated"]))
    data = retraining.data
    validation = _load_validation(subject, model, num_validation)
    deciding = {
        "name": subject.name,
        "data": data.fingerprint,
        "validation": None if validation is None else validation.fingerprint,
        "num_generated": counts["num_generated"],
        "drawing": subject.drawing.to_dict(),
        "drawn_from": None if drawn_from is None else model.identify_items(drawn_from),
        "subset_fraction": subject.subset_fraction,
        "recipe": subject.training.recipe.to_dict(),
        **retraining.deciding(),
    }
    # an existing run is never cut down: what was trained stays part of it
    sizes = {"num_subsets": 0, "num_model_seeds": 0, "num_retrain": 0}
    if found is not None:
        EXPERIMENT.check(folder, deciding)
        # a run prepared before there was a retrain family has none
        sizes = {name: found.get(name, 0) for name in sizes}
    sizes = {name: max(size, counts[name]) for name, size in sizes.items()}
    if sizes["num_retrain"] and sizes["num_subsets"] > _MOST_SUBSETS:
        raise ValueError(
            f"num_subsets must be at most {_MOST_SUBSETS} beside a retrain family, whose subsets "
            f"the next ones would be again, got {sizes['num_subsets']}"
        )
    _check_memory(len(data), **sizes)
    subsets = subject.subsets(data, sizes["num_subsets"], "lds-val")
    retrain = subject.subsets(data, sizes["num_retrain"], RETRAIN)
    manifest = {
        "subject": subject.to_dict(),
        "num_validation": 0 if validation is None else len(validation),
        "subsets": hash_tensors({"subsets": subsets}),
        RETRAIN: hash_tensors({RETRAIN: retrain}),
        **sizes,
        **({} if latents is None else {"latents": latents}),
    }
    with ExitStack() as held:
        manifest = EXPERIMENT.claim(folder, deciding, held, also=manifest, renew=True)
        write_atomically(folder / _SUBSETS, save({"subsets": subsets, RETRAIN: retrain}))
    return _assemble(folder, subject, retraining, subsets, retrain, validation, manifest)


def _read_existing(folder: Path) -> dict[str, Any] | None:
    return None if EXPERIMENT.is_free(folder) else read_manifest(folder)


def _load_validation(subject: Subject, model: Denoiser, count: int | None) -> Samples | None:
    """The held-out images, as many as asked for; None where there are none to be had.

    Raises:
        ValueError: fewer than asked for.
    """
    if subject.validation is None or count == 0:
        return None
    limit = count if count is not None or subject.preset is not None else NUM_VALIDATION
    try:
        held_out = subject.validation.load(model, subject.split, limit=limit)
    except ValueError:
        if count is not None or subject.preset is not None or subject.split != "validation":
            raise
        # data of one's own need not have such a part
        return None
    if count is not None and len(held_out) < count:
        raise ValueError(
            f"num_validation must be at most {len(held_out)}, the validation images there are, "
            f"got {count}"
        )
    return held_out


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
    """Make what all models of a run share: the latents, for a model of latents.

    Args:
        experiment: as `prepare` returned it.
        device: where.
        progress_bar: opens a progress bar with a label.

    Raises:
        RetrainingError: the run was prepared before, with other latents.
        ValueError: as `Retraining.prepare`.
    """
    digest = experiment.retraining.prepare(device, progress_bar)
    if digest is not None:
        manifest = read_manifest(experiment.folder)
        deciding = manifest.pop("settings")
        latents = {"latents": digest}
        EXPERIMENT.claim(experiment.folder, deciding, also=manifest | latents, renew=True)
    if experiment.validation is not None:
        # made now, so that the processes of a training find them
        experiment.retraining.samples(VALIDATION, experiment.validation, device)


def load_experiment(folder: Path) -> Experiment:
    """Open a folder that `prepare` made.

    Raises:
        ExperimentError: it holds no run, a damaged one, or one whose data set has changed.
    """
    manifest = read_manifest(folder)
    deciding = manifest["settings"]
    subject = Subject.from_dict(manifest["subject"])
    here = {"recipe": deciding["recipe"], "start": deciding["start"]}
    if subject.preset is not None and subject.name == subject.preset:
        preset = get_preset(subject.preset)
        here = {"recipe": preset.recipe.to_dict(), "start": preset.start().to_dict()}
    _check_same(folder, deciding, here)
    retraining = Retraining(
        subject.training,
        folder,
        subject.drawing,
        base=deciding.get("base"),
        latents=manifest.get("latents"),
    )
    data = retraining.data
    validation = _load_validation(subject, retraining.like(), manifest["num_validation"])
    _check_same(
        folder,
        deciding,
        {
            "data": data.fingerprint,
            "validation": None if validation is None else validation.fingerprint,
        },
    )
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
    return _assemble(folder, subject, retraining, subsets, retrain, validation, manifest)


def _check_same(folder: Path, deciding: Mapping[str, Any], here: dict[str, Any]) -> None:
    differing = describe_differences({key: deciding[key] for key in here}, here)
    if differing:
        raise ExperimentError(f"{folder} was prepared with something else: {differing}")


def _assemble(
    folder: Path,
    subject: Subject,
    retraining: Retraining,
    subsets: Tensor,
    retrain: Tensor,
    validation: Samples | None,
    manifest: dict[str, Any],
) -> Experiment:
    # a subset model never shares the seed of the model it stands in for
    seeds = (seed for seed in itertools.count() if seed != retraining.recipe.seed)
    return Experiment(
        folder,
        subject,
        retraining,
        subsets,
        tuple(itertools.islice(seeds, manifest["num_model_seeds"])),
        validation,
        manifest["settings"]["num_generated"],
        retrain,
    )


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
    retraining = experiment.retraining
    chosen: Tensor | None = None
    seed = retraining.recipe.seed
    if name != FULL:
        chosen, seed = experiment.training_of(name)

    def save(model: Denoiser, name: str) -> None:
        retraining.save(model, experiment.model_folder(name), chosen, seed)

    return retraining.train_once(
        name,
        chosen,
        (seed, seed),
        device,
        is_done=lambda: experiment.is_trained(name),
        finish=lambda model: save(model, name),
        keep_at=experiment.checkpoint_steps if name == FULL else (),
        keep=lambda model, step: save(model, _checkpoint_name(step)),
        progress=progress,
    )


def _checkpoint_name(step: int) -> str:
    return f"{FULL}-step-{step:06d}"


def trained_names(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are finished."""
    return [name for name in names if experiment.is_trained(name)]
