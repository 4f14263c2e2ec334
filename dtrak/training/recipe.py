"""How a model is trained, as a value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from ..runs.choices import check_choice

# courses of the learning rate after its warm-up
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: with the data and the initial weights it decides every bit.

    Attributes:
        steps: optimiser steps; ``epochs`` overrides it.
        batch_size: images per step, over all processes.
        learning_rate: peak of AdamW's learning rate; its course is
            `trainer.learning_rate_factor`.
        betas: AdamW's decay rates.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm.
        seed: of the order of the data, the timesteps, the noise, flips and dropout.
        epochs: passes over the data, which then decide the steps.
        partial_batches: end every epoch with the batch that is left over, however small, as a
            PyTorch data loader does; otherwise see `trainer.batch_indices`.
        flip: mirror each image left to right with probability a half.
        dropout: probability of every dropout layer while training; None leaves the model's.
        warm_up_from_zero: the first step has learning rate 0, as Diffusers' schedules have it.
        ema_decay: keep an exponential moving average of the weights with this largest decay, as
            Diffusers' `EMAModel` with warm-up does, and return it as the trained model.
        caption_dropout: probability that a caption is replaced by the empty one, which is what
            classifier-free guidance needs.
        schedule: of the learning rate, one of `SCHEDULES`; all warm up over a tenth of the steps.
    """

    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 4e-3
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    max_grad_norm: float = 1.0
    seed: int = 0
    epochs: int | None = None
    partial_batches: bool = False
    flip: bool = False
    dropout: float | None = None
    warm_up_from_zero: bool = False
    ema_decay: float | None = None
    caption_dropout: float = 0.0
    schedule: str = "cosine"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values; later additions only where they are used."""
        values = asdict(self) | {"betas": list(self.betas)}
        if self.epochs is not None:
            del values["steps"]
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name not in _LATER_FIELDS or value != defaults[name]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A recipe from what `to_dict` gave, or from some of the fields; the others' defaults.

        Raises:
            ValueError: a field is unknown, or its value is none that trains.
        """
        known = {field.name: type(field.default) for field in fields(cls)}
        for name in values:
            check_choice("recipe", name, known)
        given = dict(values)
        if "betas" in given:
            given["betas"] = tuple(given["betas"])
        recipe = cls(**given)
        check_recipe(recipe)
        return recipe

    def num_steps(self, size: int) -> int:
        """Optimiser steps on ``size`` images."""
        if self.epochs is None:
            return self.steps
        if self.partial_batches:
            return self.epochs * math.ceil(size / self.batch_size)
        return math.ceil(self.epochs * size / self.batch_size)


# left out where they say nothing, so that outputs of earlier versions are still recognised
_LATER_FIELDS = (
    "epochs",
    "partial_batches",
    "flip",
    "dropout",
    "warm_up_from_zero",
    "ema_decay",
    "caption_dropout",
    "schedule",
)


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that trains nothing.

    Raises:
        ValueError: a field is out of range or of another type; names the first.
    """
    check_choice("schedule", recipe.schedule, SCHEDULES)
    try:
        for name, value, holds, wanted in (
            ("steps", recipe.steps, recipe.steps >= 1, "at least 1"),
            ("epochs", recipe.epochs, recipe.epochs is None or recipe.epochs >= 1, "at least 1"),
            ("batch_size", recipe.batch_size, recipe.batch_size >= 1, "at least 1"),
            (
                "learning_rate",
                recipe.learning_rate,
                0 < recipe.learning_rate < math.inf,
                "positive and finite",
            ),
            ("seed", recipe.seed, 0 <= recipe.seed < 2**32, "in [0, 2**32)"),
            (
                "dropout",
                recipe.dropout,
                recipe.dropout is None or 0 <= recipe.dropout < 1,
                "in [0, 1)",
            ),
            (
                "ema_decay",
                recipe.ema_decay,
                recipe.ema_decay is None or 0 <= recipe.ema_decay < 1,
                "in [0, 1)",
            ),
            (
                "caption_dropout",
                recipe.caption_dropout,
                0 <= recipe.caption_dropout <= 1,
                "in [0, 1]",
            ),
            ("betas", recipe.betas, all(0 <= b < 1 for b in recipe.betas), "two in [0, 1)"),
        ):
            if not holds:
                raise ValueError(f"{name} of a recipe must be {wanted}, got {value}")
    except TypeError as error:
        raise ValueError(f"a recipe must hold numbers where it says how much, got {error}") from (
            error
        )
