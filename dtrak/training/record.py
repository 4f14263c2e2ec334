"""The record of a training, from which the model can be trained again: `training.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.choices import PRECISIONS, TRAINING_FILE, check_choice
from ..runs.files import expand_path
from .data import DataSource
from .recipe import Recipe
from .start import Start

if TYPE_CHECKING:
    from ..models.denoiser import Denoiser

_HOW = "docs/training.md says what goes into one"


class RecordError(ValueError):
    """A record of a training that cannot be used; the message says why."""


@dataclass(frozen=True)
class Training:
    """How a model was trained, or is to be.

    Attributes:
        data: the images.
        start: what it begins with.
        recipe: the rest.
        mixed_precision: of the forward pass, as `accelerate.Accelerator` calls it.
        fingerprint: of the images it was trained on; None where that is not known.
        rows: how many they were.
        model: hashes of what it began with; none where they are not known.
    """

    data: DataSource
    start: Start
    recipe: Recipe
    mixed_precision: str = "no"
    fingerprint: str | None = None
    rows: int | None = None
    model: Mapping[str, str] | None = None

    def describe(self, model: Denoiser) -> dict[str, Any]:
        """What decides the trained model besides its images, JSON-serialisable.

        Args:
            model: that `Start.make` gave.
        """
        return {
            "start": self.start.to_dict(),
            "recipe": self.recipe.to_dict(),
            "model": model.identity(),
            "schedule": model.process.describe(),
            "mixed_precision": self.mixed_precision,
        }

    @property
    def places(self) -> dict[str, str]:
        """Where the images and the model that it begins with lie."""
        given = {"data": self.data.source, "model": self.start.model}
        return {name: _absolute(place) for name, place in given.items() if place is not None}

    def to_dict(self) -> dict[str, Any]:
        """All of it, as `parse` reads it."""
        known = {"fingerprint": self.fingerprint, "rows": self.rows}
        return {
            "settings": {
                "data": self.data.to_dict() | {k: v for k, v in known.items() if v is not None},
                "start": self.start.to_dict(),
                "recipe": self.recipe.to_dict(),
                "mixed_precision": self.mixed_precision,
                **({} if self.model is None else {"model": dict(self.model)}),
            },
            "places": self.places,
        }


def _absolute(place: str) -> str:
    """A path that holds wherever it is read from; a hub's name as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def read_training(file: str | Path) -> Training:
    """The training that a trainer wrote down in ``file``, or its user by hand.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: it is no record of a training.
    """
    file = expand_path(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no record of a training at {file}") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(f"{file} must be a recipe in JSON, got {reason}: {_HOW}") from error
    try:
        return parse_training(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(f"{file} must be a recipe of a training, got {reason}: {_HOW}") from error


def parse_training(content: Mapping[str, Any]) -> Training:
    """A training from the content of its record.

    What a trainer writes has ``settings`` and ``places``; what is written by hand may have the keys
    of both at its top: ``recipe``, ``data``, ``start``, ``mixed_precision``.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    settings = dict(content.get("settings", content))
    places = dict(content.get("places", {}))
    if "recipe" not in settings:
        raise ValueError("no 'recipe' in it")
    data, start = dict(settings.get("data", {})), dict(settings.get("start", {}))
    fingerprint, rows = data.pop("fingerprint", None), data.pop("rows", None)
    if "data" in places:
        data["source"] = places["data"]
    if "model" in places:
        start["model"] = places["model"]
    if "config" in start and isinstance(start["config"], str):
        from ..models import read_config

        start["config"] = read_config(start["config"])
    precision = check_choice("mixed_precision", settings.get("mixed_precision", "no"), PRECISIONS)
    return Training(
        DataSource(**{**data, "without": tuple(data.get("without", ()))}),
        Start.from_dict(start),
        Recipe.from_dict(settings["recipe"]),
        precision,
        fingerprint,
        rows,
        settings.get("model"),
    )


def find_record(folder: str | Path) -> Path | None:
    """The record beside a trained model or adapter, a folder or a file in one; None for none."""
    place = expand_path(folder)
    file = (place if place.is_dir() else place.parent) / TRAINING_FILE
    return file if file.is_file() else None


def of_preset(name: str, source: str | None, base: str | None, precision: str) -> Training:
    """The training of a preset's full model.

    Args:
        name: of the preset.
        source: where its data set lies; None is its own.
        base: folder or hub name of the model it fine-tunes, if it does; None is its own.
        precision: of the forward pass.
    """
    from .presets import get_preset

    preset = get_preset(name)
    start = preset.start(base)
    return Training(DataSource(source, name), start, preset.recipe, precision)
