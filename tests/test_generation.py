import logging
import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from numerics import relative_error
from tiny import tiny_model
from torch import nn

from dtrak.models.process import DiscreteProcess, linear_process
from dtrak.models.unet import UNet
from dtrak.training.drawing import draw_all


class Answer:
    def __init__(self, sample):
        self.sample = sample


class Formula(nn.Module):
    """A stand-in for a U-Net, known in closed form."""

    def __init__(self, function, size=4):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = FrozenDict({"in_channels": 1, "sample_size": size})
        self.function = function

    def forward(self, sample, timestep):
        return Answer(self.function(sample, float(timestep)))


def oracle(function, seed, steps, size=4, train_steps=1000, kind="epsilon", path=None):
    """DDIM, equation 12 with η = 0, in float64 numpy; the predicted image is clipped to [-1, 1]."""
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, train_steps))
    start = torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed))
    x = start.double().numpy()
    stride = train_steps // steps
    for t in range((steps - 1) * stride, -1, -stride):
        bar, previous = bars[t], bars[t - stride] if t >= stride else 1.0
        u = function(x, float(t))
        if kind == "epsilon":
            clean, noise = (x - math.sqrt(1 - bar) * u) / math.sqrt(bar), u
        else:
            clean = math.sqrt(bar) * x - math.sqrt(1 - bar) * u
            noise = math.sqrt(bar) * u + math.sqrt(1 - bar) * x
        if path is not None:
            path.append(torch.from_numpy(clean.clip(-1, 1)))
        x = math.sqrt(previous) * clean.clip(-1, 1) + math.sqrt(1 - previous) * noise
    return torch.from_numpy(x.clip(-1, 1))


def towards_a_point(x, t):
    return 0.9 * x + 0.05 * t / 1000


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_matches_ddim_by_hand(steps, kind):
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=kind)
    model = UNet(Formula(towards_a_point), DiscreteProcess(scheduler))
    images = draw_all(model, [4, 0], num_inference_steps=steps)
    expected = torch.stack([oracle(towards_a_point, s, steps, kind=kind) for s in (4, 0)])
    assert relative_error(images, expected) < 1e-4


def test_matches_the_pipeline_of_diffusers():
    model, seeds = tiny_model(), [0, 1, 17]
    pipeline = DDIMPipeline(
        unet=model.module, scheduler=DDIMScheduler.from_config(model.process.scheduler.config)
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        batch_size=3,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=10,
        output_type="np",
    ).images
    expected = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
    assert relative_error(draw_all(model, seeds, num_inference_steps=10), expected) < 1e-6


def test_image_depends_on_its_seed_alone():
    model = tiny_model()
    seeds = [3, 0, 9, 5, 2**32 - 1]
    together = draw_all(model, seeds, num_inference_steps=5)
    for batch_size in (1, 2, 3):
        again = draw_all(model, seeds, num_inference_steps=5, batch_size=batch_size)
        assert relative_error(again, together) < 1e-5
    backwards = draw_all(model, seeds[::-1], num_inference_steps=5)
    assert relative_error(backwards.flip(0), together) < 1e-5
    alone = draw_all(model, [9], num_inference_steps=5)
    assert relative_error(alone[0], together[2]) < 1e-5
    different = (together[:, None] - together[None]).flatten(2).norm(dim=2)
    assert (different + torch.eye(5) > 0.5).all()


def test_is_deterministic_and_leaves_random_state_and_model_alone():
    model = tiny_model()
    before = [p.detach().clone() for p in model.module.parameters()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw_all(model, [0, 1], num_inference_steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw_all(model, [0, 1], num_inference_steps=5), first)
    assert all(map(torch.equal, before, model.module.parameters()))
    assert not first.requires_grad


@pytest.mark.parametrize("clip", [True, False])
def test_images_are_in_range(clip):
    scheduler = DDPMScheduler(clip_sample=clip)
    model = UNet(Formula(lambda x, t: -3 * x), DiscreteProcess(scheduler))
    images = draw_all(model, list(range(8)), num_inference_steps=3)
    assert images.dtype == torch.float32
    assert images.shape == (8, 1, 4, 4)
    assert images.min() == -1
    assert images.max() == 1


def test_clip_range_of_the_schedule_is_kept():
    scheduler = DDPMScheduler(clip_sample=True, clip_sample_range=0.25)
    model = UNet(Formula(lambda x, t: -x), DiscreteProcess(scheduler))
    # the last step leaves the predicted image alone
    assert draw_all(model, [0, 1], num_inference_steps=4).abs().max() <= 0.25


@pytest.mark.parametrize("size, shape", [(4, (4, 4)), ((4, 8), (4, 8)), ([8, 4], (8, 4))])
def test_images_have_the_size_of_the_model(size, shape):
    model = tiny_model(sample_size=size, in_channels=2, out_channels=2)
    assert draw_all(model, [0], num_inference_steps=2).shape == (1, 2, *shape)
    assert draw_all(model, []).shape == (0, 2, *shape)


def test_float64_model_draws_the_same_images():
    model = tiny_model()
    narrow = draw_all(model, [0, 1], num_inference_steps=5)
    model.module.double()
    wide = draw_all(model, [0, 1], num_inference_steps=5)
    assert wide.dtype == torch.float32
    assert relative_error(narrow, wide) < 1e-4


def test_progress_counts_steps_over_batches():
    calls = []
    draw_all(
        tiny_model(),
        [0, 1, 2],
        num_inference_steps=4,
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 8) for done in range(1, 9)]


def test_prints_nothing(capfd):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("diffusers").addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_all(tiny_model(), [0], num_inference_steps=2)
    logging.getLogger("diffusers").removeHandler(handler)
    assert records == []
    assert capfd.readouterr() == ("", "")


def test_model_with_nan_weights_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.module.conv_out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"the model drew a non-finite image from seed 12$"):
        draw_all(model, [12, 13], num_inference_steps=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_seed_of_the_first_bad_image_is_named(bad):
    def explode(x, t):
        return torch.where(torch.arange(len(x))[:, None, None, None] == 1, bad, x)

    model = UNet(Formula(explode), linear_process())
    with pytest.raises(ValueError, match=r"non-finite image from seed 21$"):
        draw_all(model, [20, 21, 22], num_inference_steps=3)
    with pytest.raises(ValueError, match=r"non-finite image from seed 23$"):
        draw_all(model, [20, 23, 21, 22], num_inference_steps=3, batch_size=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_inference_steps": 0}, r"num_inference_steps must be in \[1, 1000\], got 0"),
        ({"num_inference_steps": 1001}, r"num_inference_steps must be in \[1, 1000\], got 1001"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        draw_all(tiny_model(), [0], **options)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_that_would_draw_the_image_of_another_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seeds must be in \[0, 2\*\*32\), got {seed}"):
        draw_all(tiny_model(), [0, seed])


def test_model_without_a_size_is_refused():
    with pytest.raises(ValueError, match="must have a sample_size to draw from it, got None"):
        draw_all(tiny_model(sample_size=None), [0])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_trajectories_match_ddim_by_hand(kind):
    model = UNet(
        Formula(towards_a_point),
        DiscreteProcess(DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=kind)),
    )
    batches = list(model.draw([3, 5, 7], num_inference_steps=10, batch_size=2, trajectories=True))
    assert [batch.seeds for batch in batches] == [[3, 5], [7]]
    for batch in batches:
        assert (batch.trajectories.shape[1:], batch.trajectories.dtype) == (
            (10, 1, 4, 4),
            torch.float32,
        )
        for seed, image, path in zip(batch.seeds, batch.images, batch.trajectories, strict=True):
            expected = []
            last = oracle(towards_a_point, seed, 10, kind=kind, path=expected)
            assert relative_error(path, torch.stack(expected)) < 1e-4
            assert relative_error(image, last) < 1e-4
    # the model wanders out of [-1, 1], so it was clipped
    assert batches[0].trajectories.abs().max() == 1


def test_batches_without_trajectories_and_of_nothing():
    (batch,) = tiny_model().draw([0], num_inference_steps=2)
    assert batch.trajectories is None
    assert list(tiny_model().draw([], num_inference_steps=2)) == []
    assert draw_all(tiny_model(), []).shape == (0, 1, 8, 8)


def test_batches_are_refused_before_the_first():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tiny_model().draw([0], batch_size=0)
