"""The latents predicted on the way to a picture: against DDIM with guidance, written out."""

import pytest
import torch
from numerics import relative_error
from tiny_stable_diffusion import load_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")
PROMPTS, SEEDS = ["a sea", "a fog", "a sea"], [3, 0, 7]


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return load_tiny(tiny_pipeline)


def walk(model, scale):
    """(predicted clean latents, last latents) of guided DDIM with 4 steps, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    survive = (1 - betas).cumprod(0)
    x = torch.stack(
        [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    )
    text = model.embed(PROMPTS, torch.device("cpu"))
    empty = model.embed([""] * 3, torch.device("cpu"))
    x, paths = x.double(), []
    for t in (751, 501, 251, 1):
        with torch.no_grad():
            read, unread = (
                model.module(
                    x.float(), torch.tensor(t), encoder_hidden_states=words
                ).sample.double()
                for words in (text, empty)
            )
        noise = unread + scale * (read - unread)
        clean = (x - (1 - survive[t]).sqrt() * noise) / survive[t].sqrt()
        # the last step ends at the first timestep's noise: set_alpha_to_one is false
        before = survive[t - 250] if t > 250 else survive[0]
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
        paths.append(clean)
    return torch.stack(paths, 1), x


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_equals_guided_ddim_written_out(model, scale):
    seen = []
    (drawn,) = model.draw(
        SEEDS,
        PROMPTS,
        guidance_scale=scale,
        num_inference_steps=4,
        trajectories=True,
        progress=lambda *p: seen.append(p),
    )
    found = drawn.trajectories
    expected, last = walk(model, scale)
    assert found.shape == (3, 4, 4, 8, 8)
    assert relative_error(found, expected) < 1e-4
    assert seen == [(step, 4) for step in (1, 2, 3, 4)]
    # and it is the path of the picture
    with torch.no_grad():
        decoded = model.vae.decode(last.float() / model.vae.config.scaling_factor).sample
    assert relative_error(drawn.images, decoded.clamp(-1, 1)) < 1e-3


def test_refusals(model):
    for arguments, message in (
        ((PROMPTS, SEEDS[:2]), "seeds must be 3, one for each prompt, got 2"),
        ((["a sea"], [-1]), r"seeds must be in \[0, 2\*\*32\), got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.draw(*reversed(arguments), trajectories=True)
    with pytest.raises(ValueError, match="size must be positive multiples of 2 pixels, got 15x15"):
        model.draw([0], ["a sea"], size=15, trajectories=True)


def test_a_path_that_blows_up_is_named_by_its_seed(tiny_pipeline):
    model = load_tiny(tiny_pipeline)
    with torch.no_grad():
        model.module.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite image from seed 7"):
        next(model.draw([7], ["a sea"], num_inference_steps=2, trajectories=True))
