"""What `dtrak.planted` accepts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...methods import Method
from ...runs.choices import check_choice, check_counts, check_seed, parse_numbers
from ...runs.console import check_device
from ...runs.folders import Record
from ...runs.options import ExplainOptions
from ...runs.stated import Stated, option
from ...runs.usual import DEVICE
from ...training.presets import PRESETS, get_preset
from ..lds.names import METHODS, parse_methods
from ..lds.options import parse_features

DEFAULT_PRESET = "digits"
# made of held-out images of the data itself
INVERTED, ROTATED = CONCEPTS = ("inverted", "rotated")
WAYS = "auto,none"


class PlantedError(ValueError):
    """A folder of planted images, or images to plant, that cannot be used; it says why."""


PLANTED = Record("planted.json", "another experiment", PlantedError, format=1)


@dataclass(frozen=True)
class Options(Stated):
    """What the command line asked for."""

    preset: str | None = option(
        None, help=f"Data and model: {', '.join(PRESETS)}. Default: {DEFAULT_PRESET}."
    )
    run: str | None = option(
        None,
        help="Instead of a preset: folder that dtrak.train wrote, or a finished run of "
        "dtrak.attribute, whose model is trained again with the planted images.",
        is_path=True,
    )
    data: str | None = option(
        None,
        help="Where the training images lie. Default: the preset's, or the run's.",
        is_path=True,
    )
    recipe: str | None = option(
        None,
        help="File that says how the model of --run was trained, where it does not say so itself "
        "(docs/training.md).",
        is_path=True,
    )
    concept: str = option(
        INVERTED,
        help=f"What is planted: {' or '.join(CONCEPTS)} (a quarter turn) held-out images of the "
        "data, or where foreign images lie: a folder, a parquet file, a datasets folder or a hub "
        "name.",
        is_path=True,
    )
    labels: str | None = option(
        None, help="Of those, only images of these classes, such as 8 (CIFAR-10's ships)."
    )
    planted: int = option(50, help="P, images that are planted.")
    num_queries: int = option(
        32, help="Queries of each kind: held-out images of the concept, and pictures of it."
    )
    generated: int = option(
        256, help="Pictures the model draws; those of the concept among them are queries."
    )
    methods: str | None = option(
        None, help=f"With commas: {', '.join(method.name for method in METHODS)}. Default: all."
    )
    whiten: str = option(
        WAYS,
        help="Ways of whitening, with commas, of the methods with a damping: each is a row. Kinds "
        "as dtrak.attribute --whiten.",
    )
    timesteps: int = option(10, help="S of gradient features.")
    steps: int | None = option(None, help="Optimiser steps. Default: the recipe's.")
    seed: int = option(0, help="Of the draw of what is planted.")
    device: str = option(**DEVICE)
    output: str | None = option(
        None, help="Folder. Default: runs/planted-<preset>, or planted in the run's.", is_path=True
    )

    @property
    def folder(self) -> Path:
        """Of the experiment."""
        if self.output is not None:
            return Path(self.output)
        if self.run is not None:
            return Path(self.run) / "planted"
        return Path("runs") / f"planted-{self.preset or DEFAULT_PRESET}"

    @property
    def chosen_methods(self) -> list[Method]:
        """The methods asked for; raises as `parse_methods`."""
        return parse_methods(self.methods, with_clip=False)

    @property
    def ways(self) -> list[str]:
        """Of whitening; raises as `parse_features`."""
        return parse_features(str(self.timesteps), ExplainOptions.projection, self.whiten)[2]

    @property
    def class_numbers(self) -> list[int] | None:
        """Of foreign images; None for all."""
        return None if self.labels is None else parse_numbers("--labels", self.labels)

    @property
    def settings(self) -> list[ExplainOptions]:
        """How scores are made, row by row: every method, those with a damping in every way."""
        return [
            ExplainOptions(
                method=method.name, whiten=way, timesteps=str(self.timesteps), device=self.device
            )
            for method in self.chosen_methods
            for way in (self.ways if method.is_damped else ["none"])
        ]

    def check(self) -> None:
        """Refuse what needs neither the model nor the images.

        Raises:
            ValueError: an option or the folder is refused; one clear line.
            FileNotFoundError: there is no such run.
        """
        check_device(self.device)
        check_counts(
            planted=self.planted,
            num_queries=self.num_queries,
            generated=self.generated,
            timesteps=self.timesteps,
            steps=self.steps,
        )
        if self.preset is not None:
            get_preset(check_choice("--preset", self.preset, PRESETS))
        if self.preset is not None and self.run is not None:
            raise ValueError("--run and --preset exclude each other, got both")
        if self.recipe is not None and self.run is None:
            raise ValueError("--recipe needs --run, whose model it is about")
        check_seed("--seed", self.seed)
        if self.labels is not None and self.concept in CONCEPTS:
            raise ValueError(
                f"--labels choose among foreign images, got it with --concept {self.concept}"
            )
        _ = self.class_numbers, self.settings
        PLANTED.check(self.folder, {}, partly=True)
        if self.run is not None and not Path(self.run).is_dir():
            raise FileNotFoundError(f"--run must be an existing folder, got {self.run}")
