"""Whether a model learned anything: its error on training images against predicting nothing.

Scores of a model that learned nothing look like those of any other: nothing in them says so.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..data.samples import Samples
from ..models.denoiser import Denoiser
from .extraction import autocast, check_prediction, condition_rows, given, noisy_rows
from .settings import FeatureSettings

# names of facts: the figure, and what a page says first
FIT, WARNING = "error on training images", "warning"
# training images, evenly spaced, and timesteps of each: eighths of the schedule, since next to no
# noise nothing can be predicted
_IMAGES, _EIGHTHS = 16, (1, 3, 5, 7)
# of the error of predicting nothing
_NOTHING = 0.95


def measure_fit(
    model: Denoiser, settings: FeatureSettings, data: Samples, device: torch.device
) -> float:
    """The model's squared error on training images, as a multiple of that of predicting 0.

    1 is a model that knows nothing; one that is finished has much less. What is predicted is the
    model's own target: the noise, the velocity or the sample. An adapter is judged with its base.

    Args:
        model: on the device.
        settings: of its features: the noise and the dtype.
        data: N training images, of which 16 are looked at, at 4 timesteps each.
        device: of the model.

    Raises:
        ValueError: the model's output is not finite.
    """
    T = model.process.num_timesteps
    at = tuple(dict.fromkeys(eighth * T // 8 for eighth in _EIGHTHS))
    settings = replace(settings, timesteps=at)
    dtype = torch.float64 if settings.dtype == "float64" else torch.float32
    error = nothing = 0.0
    for row in range(0, len(data), -(-len(data) // _IMAGES)):
        rows = slice(row, row + 1)
        inputs = given(model, data, rows, device).to(device, dtype)
        ids = [f"fit/{name}" for name in data.ids[rows]]
        noisy, target, timesteps = noisy_rows(model, settings, inputs, ids)
        condition = condition_rows(model, data.conditions_of(rows), len(at), inputs)
        with torch.no_grad(), autocast(device, settings.dtype):
            prediction = model.predict(noisy, timesteps, condition)
        check_prediction(prediction, ids, timesteps)
        error += float((prediction.double() - target.double()).square().sum())
        nothing += float(target.double().square().sum())
    return error / nothing if nothing else 0.0


def describe_fit(fit: float) -> dict[str, str]:
    """What `measure_fit` found, as facts; with a warning where the model learned nothing."""
    facts = {FIT: f"{fit:.3g} of that of predicting nothing"}
    if fit >= _NOTHING:
        facts[WARNING] = (
            f"This model learned nothing: its error on training images is {fit:.3g} of that of "
            "predicting nothing. Its scores say nothing about what made a picture."
        )
    return facts
