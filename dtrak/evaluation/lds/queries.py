"""The queries of an experiment: held-out images, and images that the full model draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...data.captions import write_captions
from ...data.images import load_data
from ...data.samples import Samples
from ...runs.files import picture_name, write_atomically
from ...runs.folders import alone_at
from ...training.drawing import keep, missing_seeds
from ..retraining import Progress
from .experiment import Experiment
from .options import GENERATED, VALIDATION, ExperimentError

# in the folder of generated queries
_PAINTER_FILE = "drawn_by.json"


def generated_queries(
    experiment: Experiment, device: torch.device, progress: Progress | None = None
) -> Samples:
    """The images the full model draws, image i from seed i; drawn where they are missing.

    A model that reads captions draws image i from prompt i, the prompts in ``metadata.jsonl``.

    Returns:
        The images as saved, 8 bits a channel, with what they were drawn from.

    Raises:
        ExperimentError: the full model is not trained yet, or another one than that of the folder
            drew the images that are there.
    """
    folder = experiment.folder / GENERATED
    if len(missing_queries(experiment)) < experiment.num_generated:
        # drawn anew, they would take the losses of every model along: that is for the user to say
        check_painter(experiment.folder, experiment.sample_weights())
    if missing_queries(experiment):
        # another device draws other pictures: those that losses were measured of must stay
        with alone_at(experiment.folder, GENERATED, wait=True):
            _draw_queries(experiment, folder, device, progress)
    count = experiment.num_generated
    pictures = load_data(folder, channels=experiment.data.shape[0], limit=count)
    return pictures.conditioned(drawn_from(experiment))


def drawn_from(experiment: Experiment) -> list[Any] | None:
    """The caption or label of every generated query; None for a model that reads nothing."""
    model = experiment.retraining.like()
    return experiment.subject.items_of(model, range(experiment.num_generated))


def _draw_queries(
    experiment: Experiment, folder: Path, device: torch.device, progress: Progress | None
) -> None:
    missing = missing_queries(experiment)
    if not missing:
        return
    model = experiment.load_model()
    folder.mkdir(exist_ok=True)
    if len(missing) == experiment.num_generated:
        record_painter(experiment.folder, experiment.sample_weights())
    items = drawn_from(experiment)
    if items is not None and model.reads == "captions":
        write_captions(folder, {picture_name(seed): text for seed, text in enumerate(items)})
    chosen = None if items is None else [items[seed] for seed in missing]
    for batch in experiment.retraining.draw(model, missing, chosen, device, progress=progress):
        keep(folder, batch)


def missing_queries(experiment: Experiment) -> list[int]:
    """Seeds of the generated queries that are not drawn yet."""
    return missing_seeds(experiment.folder / GENERATED, range(experiment.num_generated))


def query_sets(
    experiment: Experiment, device: torch.device, progress: Progress | None = None
) -> dict[str, Samples]:
    """The queries by the name of their kind, validation and generated, as models are given them."""
    pictures = {VALIDATION: experiment.validation}
    pictures |= {GENERATED: generated_queries(experiment, device, progress)}
    return {
        role: experiment.retraining.samples(role, images, device, progress)
        for role, images in pictures.items()
        if images is not None
    }


def record_painter(folder: Path, weights: str | None) -> None:
    """Note beside the generated queries of the run in ``folder`` which model draws them.

    Args:
        folder: of the run.
        weights: of its full model, as `retraining.sample_weights`.
    """
    content = json.dumps({"weights": weights}, indent=1).encode()
    write_atomically(folder / GENERATED / _PAINTER_FILE, content)


def check_painter(folder: Path, weights: str | None) -> None:
    """Refuse generated queries that another full model drew than the one that is there.

    Queries that do not say which model drew them, as those of older versions, are taken for those
    of the model that is there; where the model is gone, they are kept for what they were.

    Args:
        folder: of the run.
        weights: of its full model, as `retraining.sample_weights`; None for none.

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
