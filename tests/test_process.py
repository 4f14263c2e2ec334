"""Noise processes: what is added, what is predicted, where timesteps lie, what manifests say."""

import json
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from numerics import relative_error
from tiny import tiny_model, tiny_unet

from dtrak.features.extraction import deciding_settings
from dtrak.features.settings import FeatureSettings
from dtrak.features.timesteps import Timesteps
from dtrak.models import load
from dtrak.models.denoiser import Denoiser, ModelError
from dtrak.models.process import FlowMatching, linear_process
from dtrak.models.weights import load_process
from dtrak.runs.choices import DENSITIES
from dtrak_kernels import Projection

SCHEDULERS = {
    "plain": {},
    "shifted": {"shift": 3.0},
    "resolution": {"use_dynamic_shifting": True},
}


def flow(scheduler="plain", **options):
    return FlowMatching(FlowMatchEulerDiscreteScheduler(**SCHEDULERS[scheduler]), **options)


def sigma_by_hand(index, shift=1.0):
    u = (index + 1) / 1000
    return shift * u / (1 + (shift - 1) * u)


@pytest.mark.parametrize("scheduler, shift", [("plain", 1.0), ("shifted", 3.0)])
def test_a_flow_goes_straight_from_sample_to_noise(scheduler, shift):
    process = flow(scheduler)
    x, noise = (torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 10, 500, 999])
    noisy, target = process.add(x, noise, t), process.target(x, noise, t)
    for row, index in enumerate(t.tolist()):
        sigma = sigma_by_hand(index, shift)
        expected = (1 - sigma) * x[row] + sigma * noise[row]
        assert relative_error(noisy[row], expected) < 1e-6
        assert relative_error(target[row], noise[row] - x[row]) < 1e-12
        # one step of size σ against the velocity leads back
        assert relative_error(noisy[row] - sigma * target[row], x[row]) < 1e-6
        assert math.isclose(float(process.time(t)[row]), 1000 * sigma, rel_tol=1e-6)
        weight = (1 - sigma) / sigma
        assert math.isclose(float(process.weight(t)[row]), weight, rel_tol=1e-4, abs_tol=1e-6)
    assert process.num_timesteps == 1000
    # the model is told the times that the scheduler steps through
    assert torch.equal(process.time(torch.arange(1000)).flip(0), process.scheduler.timesteps)


def test_a_shift_by_resolution_follows_the_sample():
    """FLUX: mu rises from 0.5 at 256 tokens to 1.15 at 4096."""
    fixed = flow("resolution", patch=2)
    bound = flow("resolution", patch=2, shift="resolution")
    t = torch.tensor([99, 499, 899])
    assert relative_error(fixed.sigma(t), (t + 1) / 1000) < 1e-6
    for side, mu in ((32, 0.5), (128, 1.15)):
        u = (t + 1) / 1000
        expected = math.exp(mu) / (math.exp(mu) + 1 / u - 1)
        assert relative_error(bound.sigma(t, (16, side, side)), expected) < 1e-6
        # as the pipeline draws
        bound.scheduler.set_timesteps(sigmas=(u.flip(0)).tolist(), mu=mu)
        assert relative_error(bound.scheduler.sigmas[:3].flip(0), expected) < 1e-6
        x = torch.ones(3, 16, side, side)
        assert relative_error(bound.add(x, 0 * x, t)[:, 0, 0, 0], 1 - expected) < 1e-6
    with pytest.raises(ValueError, match="shape must be given"):
        bound.sigma(t)
    with pytest.raises(ValueError, match="'scheduler' for a schedule without use_dynamic_shifting"):
        flow(shift="resolution")


@pytest.mark.parametrize("option", ["density", "weighting", "shift"])
def test_an_unknown_option_is_named(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'x'"):
        flow(**{option: "x"})


@pytest.mark.parametrize("density", DENSITIES)
def test_timesteps_are_spread_as_training_draws_them(density):
    process = flow(density=density)
    drawn = process.draw_timesteps(200_000, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    chosen = process.spread(10)
    assert chosen == sorted(set(chosen))
    quantiles = torch.quantile(drawn.double()[:100_000], torch.linspace(0.05, 0.95, 10).double())
    assert (quantiles - torch.tensor(chosen)).abs().max() < 8
    for count in (1, 333, 1000):
        chosen = process.spread(count)
        assert len(set(chosen)) == count
        assert (min(chosen) >= 0, max(chosen) < 1000) == (True, True)
    again = process.draw_timesteps(200_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_the_discrete_process_spreads_and_draws_as_before():
    process = linear_process()
    assert Timesteps.parse(10).resolve(1000, process.spread) == tuple(range(0, 1000, 100))
    assert Timesteps.parse(3).resolve(1000, process.spread) == (0, 333, 666)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = torch.randint(1000, (7,), generator=generators[0])
    assert torch.equal(process.draw_timesteps(7, generators[1]), expected)
    assert Timesteps.parse(2).resolve(1000, flow().spread) == (250, 750)
    assert Timesteps.parse(2, "cumulative").resolve(1000, flow().spread) == (0, 1)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_the_training_loss_is_weighed_by_sigma(weighting):
    process, t = flow("shifted", weighting=weighting), torch.tensor([5, 400, 990])
    u, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    total = 0.0
    for row, index in enumerate(t.tolist()):
        sigma = sigma_by_hand(index, 3.0)
        weight = {
            "none": 1.0,
            "sigma_sqrt": sigma**-2,
            "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
        }[weighting]
        total += weight * float((u[row] - v[row]).double().square().mean()) / 3
    assert math.isclose(float(process.loss(u, v, t)), total, rel_tol=1e-5)


def test_manifests_say_sigma(tmp_path):
    from dtrak.data.samples import Samples

    data = Samples(torch.zeros(2, 3), ["a", "b"], None, "vectors")
    settings = FeatureSettings("loss", (249, 749), 0, Projection("none"))
    module = torch.nn.Linear(3, 3)

    def found(process):
        model = Denoiser.of(module, process, lambda m, x, t, c: m(x))
        return deciding_settings(model, settings, data, "fused")

    assert found(flow())["sigmas"] == pytest.approx([0.25, 0.75])
    assert found(flow("shifted"))["sigmas"] == pytest.approx([0.5, 0.9])
    assert "sigmas" not in found(linear_process())
    schedules = [
        flow(), flow("shifted"), flow(density="mode"), flow(weighting="cosmap"),
        flow("resolution"), flow("resolution", shift="resolution"),
    ]  # fmt: skip
    texts = {json.dumps(process.describe()) for process in schedules}
    assert len(texts) == len(schedules)


def write_scheduler(folder, scheduler, **changes):
    scheduler.save_pretrained(folder / "scheduler")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_a_flow_is_read_from_its_folder(tmp_path):
    folder = write_scheduler(tmp_path, FlowMatchEulerDiscreteScheduler(shift=3.0))
    process = load_process(folder, density="logit_normal", weighting=None)
    assert isinstance(process, FlowMatching)
    assert (process.density, process.weighting) == ("logit_normal", "none")
    assert relative_error(process.sigmas[[0, -1]], torch.tensor([3 / 1002, 1.0])) < 1e-6
    # of Heun's scheduler the schedule counts
    write_scheduler(
        tmp_path, FlowMatchEulerDiscreteScheduler(), _class_name="FlowMatchHeunDiscrete"
    )
    assert isinstance(load_process(folder), FlowMatching)
    write_scheduler(tmp_path, FlowMatchEulerDiscreteScheduler(), _class_name="Other")
    with pytest.raises(ModelError, match="a schedule of betas or of flows, got 'Other'"):
        load_process(folder)


@pytest.mark.parametrize("epsilon, expected", [(False, "sample"), (True, "epsilon")])
def test_the_old_name_of_the_prediction_type(epsilon, expected, tmp_path):
    """Diffusers before 0.10 wrote ``predict_epsilon``."""
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    write_scheduler(tmp_path, DDPMScheduler(), prediction_type=None, predict_epsilon=epsilon)
    model = load(tmp_path)
    x, noise = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    target = model.process.target(x, noise, torch.tensor([3]))
    assert torch.equal(target, {"sample": x, "epsilon": noise}[expected])
    # a newer configuration that says something else contradicts it
    write_scheduler(tmp_path, DDPMScheduler(prediction_type="v_prediction"), predict_epsilon=False)
    with pytest.raises(ModelError, match="must say once what the network predicts"):
        load(tmp_path)


def test_a_u_net_of_pixels_may_be_a_flow(tmp_path):
    """Nothing about a kind says which process it has."""
    from dtrak.features.extraction import FusedExtractor
    from dtrak.features.noise import sample_noise
    from dtrak.models.unet import UNet

    process = flow("shifted")
    settings = FeatureSettings("loss", (100, 600), 0, Projection("none"), "float64")
    model = UNet(tiny_model().module, process)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    features = FusedExtractor(model, settings, torch.device("cpu")).extract(images, ["a", "b"])
    module = tiny_unet().double()
    for row, name in enumerate("ab"):
        total = 0
        for t in settings.timesteps:
            noise = sample_noise([name], [t], (1, 8, 8), seed=0, dtype=torch.float64)[0]
            # the scheduler's own, float32
            sigma = float(process.scheduler.sigmas.flip(0)[t])
            noisy = (1 - sigma) * images[row].double() + sigma * noise
            velocity = noise - images[row].double()
            u = module(noisy, torch.tensor([1000 * process.scheduler.sigmas.flip(0)[t]])).sample
            total = total + (u - velocity).square().mean() / 2
        grads = torch.autograd.grad(total, list(module.parameters()))
        expected = torch.cat([grad.flatten() for grad in grads])
        assert relative_error(features[row], expected) < 1e-6
    (drawn,) = model.draw([4], num_inference_steps=3, trajectories=True)
    x = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(4))[None].double()
    ends = torch.linspace(1, sigma_by_hand(0, 3.0), 3).double()
    levels = torch.cat([3 * ends / (1 + 2 * ends), torch.zeros(1).double()])
    with torch.no_grad():
        for step, (now, after) in enumerate(pairwise(levels)):
            velocity = module(x, (1000 * now).float()).sample
            assert relative_error(drawn.trajectories[:, step], x - now * velocity) < 1e-5
            x = x + (after - now) * velocity
    assert relative_error(drawn.images, x.clamp(-1, 1)) < 1e-5
    table = torch.tensor([sigma_by_hand(t, 3.0) for t in range(1000)]).double()
    nearest = [int((table - level).abs().argmin()) for level in levels[:-1]]
    assert model.drawing_timesteps(3) == nearest
