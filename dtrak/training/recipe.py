"""How a model is trained, as a value."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


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

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values; later additions only where they are used."""
        values = asdict(self) | {"betas": list(self.betas)}
        if self.epochs is not None:
            del values["steps"]
        return {
            name: value
            for name, value in values.items()
            if name not in _LATER_FIELDS or not (value is None or value is False)
        }

    def num_steps(self, size: int) -> int:
        """Optimiser steps on ``size`` images."""
        if self.epochs is None:
            return self.steps
        if self.partial_batches:
            return self.epochs * math.ceil(size / self.batch_size)
        return math.ceil(self.epochs * size / self.batch_size)


# left out where they say nothing, so that outputs of earlier versions are still recognised
_LATER_FIELDS = ("epochs", "partial_batches", "flip", "dropout", "warm_up_from_zero", "ema_decay")
