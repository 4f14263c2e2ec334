"""Whether a model learned anything is measured, not guessed."""

import numpy as np
import pytest
import torch
from torch import nn

from dtrak.data.samples import Samples
from dtrak.features.fit import FIT, WARNING, describe_fit, measure_fit
from dtrak.features.noise import sample_noise
from dtrak.features.settings import FeatureSettings
from dtrak.models.denoiser import Denoiser
from dtrak.models.process import linear_process
from dtrak_kernels import Projection

SETTINGS = FeatureSettings("loss", (0, 500), 3, Projection("sjlt", 256))


class Echo(nn.Module):
    """Says a multiple of what it sees: at much noise that is most of the noise."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * x


def echo(scale):
    return Denoiser.of(Echo(scale), linear_process(), lambda module, x, t, _: module(x))


def data(N=20):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(N, 1, 4, 4, generator=generator) * 2 - 1
    return Samples(pixels, [f"{i}.png" for i in range(N)], None, "")


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
def test_the_error_is_that_of_the_model_over_that_of_nothing(scale):
    samples, process = data(), linear_process()
    error = nothing = 0.0
    # every second of twenty, so that at most sixteen are looked at
    for row in range(0, 20, 2):
        for t in (125, 375, 625, 875):
            noise = sample_noise([f"fit/{row}.png"], [t], (1, 4, 4), seed=3)[0, 0].numpy()
            alpha = float(process.scheduler.alphas_cumprod[t].double())
            clean = samples.images[row].double().numpy()
            noisy = np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise
            error += float(((scale * noisy - noise) ** 2).sum())
            nothing += float((noise**2).sum())
    found = measure_fit(echo(scale), SETTINGS, samples, torch.device("cpu"))
    assert found == pytest.approx(error / nothing, rel=1e-5)
    assert (WARNING in describe_fit(found)) == (scale == 0.0)


def test_what_is_said_of_it():
    assert describe_fit(0.1234) == {FIT: "0.123 of that of predicting nothing"}
    assert "learned nothing" in describe_fit(1.02)[WARNING]


def test_a_model_whose_output_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"output is not finite for sample 'fit/0\.png'"):
        measure_fit(echo(float("nan")), SETTINGS, data(), torch.device("cpu"))
