"""Pipelines without a file here: the recorded call is the explicit one, and the network's by hand.

The oracles call the networks of Diffusers with their arguments written out, one sample at a time.
"""

import inspect
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from numerics import relative_error
from tiny_pipelines import OTHERS, build, z_image
from tiny_stable_diffusion import shake_lora

from dtrak.data.rows import InMemory
from dtrak.data.samples import Samples
from dtrak.features.extraction import FusedExtractor, extract_rows
from dtrak.features.noise import sample_noise
from dtrak.features.settings import FeatureSettings
from dtrak.models import ModelError, load, wrap
from dtrak.models.places import locate
from dtrak.models.recorded import Recorded
from dtrak.pages.support import table
from dtrak_kernels import Projection

CPU = torch.device("cpu")
CAPTIONS = ["fog", "a sea of the old days", ""]
TIMES = (150, 730)
EXPLICIT = ("sd", "sdxl", "dit", "sd3", "flux")

pytestmark = pytest.mark.filterwarnings("ignore:.*(FluxPosEmbed|clip_sample).*:FutureWarning")


@pytest.fixture(scope="module")
def folders(shared):
    def build_all(folder):
        for kind in (*EXPLICIT, *OTHERS):
            build(kind, folder / kind / "pipeline")

    return {
        kind: shared("recorded", build_all) / kind / "pipeline" for kind in (*EXPLICIT, *OTHERS)
    }


@pytest.mark.parametrize("kind", EXPLICIT)
def test_the_recorded_call_is_the_explicit_one(kind, folders):
    how = {"guidance": 2.0} if kind == "flux" else {}
    known, recorded = load(folders[kind], **how), Recorded.load(locate(folders[kind]), **how)
    assert recorded.parameters() == known.parameters()
    assert recorded.factor * recorded.patch == known.factor * known.patch
    items = [2, 0, 1] if kind == "dit" else CAPTIONS
    times = torch.tensor([150, 730, 20])
    # a DiT has one size
    for side in (8,) if kind == "dit" else (8, 16):
        noisy = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(side))
        with torch.no_grad():
            expected = known.predict(noisy, times, known.condition(items, CPU))
            found = recorded.predict(noisy, times, recorded.condition(items, CPU))
        assert torch.equal(found, expected), side
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(recorded.inputs(pixels, CPU), known.inputs(pixels, CPU))
    if kind not in ("sd", "sdxl"):
        # which begin one timestep later here
        assert recorded.drawing_timesteps(4) == known.drawing_timesteps(4)
    identity = recorded.identity()
    assert identity.pop("called")
    assert identity == known.identity()


def sigma_of(kind, t):
    """Noise level of a flow; None for a discrete process."""
    u = (t + 1) / 1000
    shift = {"sana": 3.0, "lumina": 6.0, "auraflow": 1.73}.get(
        kind, None if kind == "pixart" else 1.0
    )
    return None if shift is None else shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def text_by_hand(pipeline, kind, caption):
    """Hidden states of one caption, and its mask."""
    if kind == "qwen":
        # nothing is filled up, and so nothing hidden
        read = pipeline.tokenizer([pipeline.prompt_template_encode.format(caption)])
        ids = torch.tensor(read.input_ids)
        states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
        return states[:, pipeline.prompt_template_encode_start_idx :], None
    if kind == "klein":
        text = f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
        read = pipeline.tokenizer(
            [text], padding="max_length", truncation=True, max_length=512, return_tensors="pt"
        )
        layers = pipeline.text_encoder(**read, output_hidden_states=True).hidden_states
        return torch.cat([layers[n] for n in (9, 18, 27)], dim=2), None
    length = {"pixart": 120, "sana": 300, "chroma": 512}.get(kind, 256)
    if kind == "sana":
        # what its call puts before a caption
        signature = inspect.signature(type(pipeline).__call__)
        told = signature.parameters["complex_human_instruction"].default
        prefix = "\n".join(told)
        words = len(pipeline.tokenizer.encode(prefix))
        read = pipeline.tokenizer(
            [prefix + caption.lower().strip()], padding="max_length", truncation=True,
            max_length=words + length - 2, return_tensors="pt",
        )  # fmt: skip
        chosen = [0, *range(-length + 1, 0)]
        states = pipeline.text_encoder(read.input_ids, attention_mask=read.attention_mask)[0]
        return states[:, chosen], read.attention_mask[:, chosen]
    if kind == "lumina":
        start = (
            "You are an assistant designed to generate superior images with the superior degree of "
            "image-text alignment based on textual prompts or user prompts."
        )
        caption = f"{start} <Prompt Start> {caption}"
    read = pipeline.tokenizer(
        [caption], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    mask = read.attention_mask
    encoded = pipeline.text_encoder(read.input_ids, attention_mask=mask, output_hidden_states=True)
    states = encoded.hidden_states[-2] if kind == "lumina" else encoded.last_hidden_state
    return (states * mask[..., None] if kind == "auraflow" else states), mask


def call_by_hand(network, kind, x, t, states, mask):
    """The prediction for one noisy sample ``[C, h, w]``."""
    sigma = sigma_of(kind, t)
    if kind == "pixart":
        added = {"resolution": None, "aspect_ratio": None}
        return network(
            x[None], encoder_hidden_states=states, timestep=torch.tensor([t]),
            encoder_attention_mask=mask, added_cond_kwargs=added,
        ).sample[0, :4]  # fmt: skip
    if kind == "chroma":
        height, width = x.shape[1] // 2, x.shape[2] // 2
        blocks = x.reshape(4, height, 2, width, 2).permute(1, 3, 0, 2, 4)
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        places = torch.cat([torch.zeros(len(places), 1), places], dim=1)
        # one token of padding is read
        seen = torch.arange(mask.shape[1])[None] <= mask.sum(1, keepdim=True)
        # numbers, which are added to what attention sees
        both = torch.cat([seen.to(x.dtype), torch.ones(1, len(places), dtype=x.dtype)], dim=1)
        packed = network(
            hidden_states=blocks.reshape(1, height * width, 16), timestep=torch.tensor([sigma]),
            encoder_hidden_states=states, txt_ids=torch.zeros(states.shape[1], 3),
            img_ids=places, attention_mask=both,
        ).sample[0]  # fmt: skip
        return packed.reshape(height, width, 4, 2, 2).permute(2, 0, 3, 1, 4).reshape(x.shape)
    if kind in ("qwen", "klein"):
        height, width = x.shape[1] // 2, x.shape[2] // 2
        tokens = x.reshape(4, height, 2, width, 2).permute(1, 3, 0, 2, 4).reshape(1, -1, 16)
        more = {"img_shapes": [[(1, height, width)]]}
        if kind == "klein":
            places = torch.cartesian_prod(
                torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1)
            )
            words = torch.zeros(states.shape[1], 4).index_fill(1, torch.tensor([3]), 1)
            more = {"img_ids": places, "txt_ids": words.cumsum(0) - words}
        tokens = network(
            hidden_states=tokens, timestep=torch.tensor([sigma]), encoder_hidden_states=states,
            **more,
        ).sample[0]  # fmt: skip
        return tokens.reshape(height, width, 4, 2, 2).permute(2, 0, 3, 1, 4).reshape(x.shape)
    told = 1 - sigma if kind == "lumina" else sigma
    masks = {} if kind == "auraflow" else {"encoder_attention_mask": mask}
    output = network(
        hidden_states=x[None], timestep=torch.tensor([told]), encoder_hidden_states=states, **masks
    )
    return output.sample[0] * (-1 if kind == "lumina" else 1)


# what is slow, and whose calls of their own are tested elsewhere
SLOW = ("klein",)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.full) if k in SLOW else k for k in OTHERS]
)
def test_features_of_others_are_the_gradients_of_single_samples(kind, folders):
    model = load(folders[kind])
    assert isinstance(model, Recorded)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pixels = torch.zeros(3, 3, 8 * model.factor, 8 * model.factor)
    data = Samples(pixels, ["0", "1", "2"], None, "latents", CAPTIONS).encoded(InMemory(latents))
    settings = FeatureSettings("loss", TIMES, 0, Projection("none"), "float64")
    features = extract_rows(FusedExtractor(model, settings, CPU), data, slice(0, 3))
    pipeline = DiffusionPipeline.from_pretrained(folders[kind], local_files_only=True)
    network = pipeline.transformer.double()
    rows = []
    for index, caption in enumerate(CAPTIONS):
        states, mask = text_by_hand(pipeline, kind, caption)
        total = 0
        for t in TIMES:
            noise = sample_noise([f"{index}"], [t], (4, 8, 8), seed=0, dtype=torch.float64)[0, 0]
            x, sigma = latents[index].double(), sigma_of(kind, t)
            if sigma is None:
                bar = torch.cumprod(1 - pipeline.scheduler.betas.double(), 0)[t]
                noisy, target = bar.sqrt() * x + (1 - bar).sqrt() * noise, noise
            else:
                noisy, target = (1 - sigma) * x + sigma * noise, noise - x
            found = call_by_hand(network, kind, noisy, t, states.double(), mask)
            total = total + (found - target).square().mean() / len(TIMES)
        network.zero_grad()
        total.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    assert relative_error(features, torch.stack(rows)) < 1e-5


@pytest.mark.parametrize("kind", ["qwen", "klein"])
def test_latents_that_are_scaled_number_by_number(kind, folders):
    model = load(folders[kind])
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = DiffusionPipeline.from_pretrained(folders[kind], local_files_only=True).vae.double()
    if kind == "qwen":
        # by channel, of a video of one frame
        found = vae.encode(pixels[:, :, None].double()).latent_dist.mode()[:, :, 0]
        mean, std = (
            torch.tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std")
        )
        expected = (found - mean) / std
        assert model.encoding["latents_mean"] == vae.config.latents_mean
    else:
        # by channel and place in a token of two by two
        found, expected = vae.encode(pixels.double()).latent_dist.mode(), torch.empty(2, 4, 8, 12)
        for number in range(16):
            channel, y, x = number // 4, number // 2 % 2, number % 2
            mean, std = vae.bn.running_mean[number], (vae.bn.running_var[number] + 1e-4).sqrt()
            expected[:, channel, y::2, x::2] = (found[:, channel, y::2, x::2] - mean) / std
        assert len(model.encoding["scaled"]) == 2
    assert relative_error(model.inputs(pixels, CPU), expected) < 1e-5
    assert model.posterior(pixels, CPU).shape == (2, 2, 4, 8, 12)


def test_captions_of_their_own_lengths(folders):
    model = load(folders["qwen"])
    noisy = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([150, 730, 20])
    condition = model.condition(CAPTIONS, CPU)
    mask = condition["encoder_hidden_states_mask"]
    # bytes, and what the template has behind them
    longest = len(CAPTIONS[1])
    assert [int(row.sum()) - int(mask[2].sum()) for row in mask] == [3, longest, 0]
    with torch.no_grad():
        found = model.predict(noisy, times, condition)
        for row, caption in enumerate(CAPTIONS):
            alone = model.condition([caption], CPU)
            assert alone["encoder_hidden_states_mask"].all()
            one = slice(row, row + 1)
            assert relative_error(found[one], model.predict(noisy[one], times[one], alone)) < 1e-5
            # another one where all are as long
            again = load(folders["qwen"]).condition([caption, caption[::-1]], CPU)
            assert (
                relative_error(again["encoder_hidden_states"][:1], alone["encoder_hidden_states"])
                < 1e-5
            )


def test_another_size_of_a_network_in_16_bits(folders):
    model, exact = (shake_lora(load(folders["qwen"]).put_adapter(2)) for _ in range(2))
    model.to(CPU, "bfloat16")
    noisy = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([150, 730, 20])
    with torch.no_grad():
        expected = exact.predict(noisy, times, exact.condition(CAPTIONS, CPU))
        # its arguments are recorded within
        with torch.autocast("cpu", torch.bfloat16):
            found = model.predict(noisy, times, model.condition(CAPTIONS, CPU))
    assert 0 < relative_error(found, expected) < 0.03


def test_a_mask_of_caption_and_picture_grows_and_shrinks_with_the_picture(folders):
    pipeline = DiffusionPipeline.from_pretrained(folders["chroma"], local_files_only=True)
    pipeline.default_sample_size = 4
    small, large = wrap(pipeline), load(folders["chroma"])
    noisy = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([150, 730, 20])
    with torch.no_grad():
        found, expected = (
            m.predict(noisy, times, m.condition(CAPTIONS, CPU)) for m in (small, large)
        )
    assert torch.equal(found, expected)


def test_an_adapter_of_another_pipeline(folders, tmp_path):
    model = shake_lora(load(folders["pixart"]).put_adapter(2))
    model.save(tmp_path)
    again = load(folders["pixart"], tmp_path)
    assert again.identity() == model.identity()
    assert all(".lora_" in name for name in again.parameters())
    pipeline = DiffusionPipeline.from_pretrained(folders["pixart"], local_files_only=True)
    assert wrap(pipeline).identity() == load(folders["pixart"]).identity()


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(k, marks=pytest.mark.full) for k in ("sana", "klein")), "chroma", "qwen"],
)
def test_pictures_are_the_pipelines(kind, folders):
    model = load(folders[kind])
    size = 8 * model.factor
    drawn = next(
        model.draw([5, 6], ["a", "b"], num_inference_steps=2, size=size, trajectories=True)
    )
    assert drawn.trajectories.shape == (2, 2, 4, 8, 8)
    pipeline = DiffusionPipeline.from_pretrained(folders[kind], local_files_only=True)
    pipeline.scheduler = model.process.sampler()
    pipeline.set_progress_bar_config(disable=True)
    binned = {"use_resolution_binning": False} if kind == "sana" else {}
    expected = pipeline(
        prompt="b", height=size, width=size, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(6), **binned,
    ).images[0]  # fmt: skip
    assert relative_error(drawn.images[1], expected * 2 - 1) < 1e-4
    assert model.reads == "captions"
    assert (model.guidance_scale, model.num_inference_steps) == {
        "sana": (4.5, 20), "chroma": (5.0, 35), "qwen": (None, 50), "klein": (4.0, 50)
    }[kind]  # fmt: skip


def test_what_is_not_understood_is_refused_by_name(folders, monkeypatch):
    def pipeline(kind="pixart"):
        return DiffusionPipeline.from_pretrained(folders[kind], local_files_only=True)

    def refused(changed, message):
        with pytest.raises(ModelError, match=f"Pipeline, and what it does .*: {message}"):
            wrap(changed)

    def of_lists(args, kwargs):
        return args, kwargs | {"encoder_hidden_states": list(kwargs["encoder_hidden_states"])}

    def halved(args, kwargs):
        return (args[0] / 2, *args[1:]), kwargs

    def timeless(args, kwargs):
        return args, kwargs | {"timestep": torch.zeros_like(kwargs["timestep"])}

    def squared(args, kwargs):
        return args, kwargs | {"timestep": kwargs["timestep"].double() ** 2}

    kind = type(pipeline().transformer)
    call = kind.__call__
    for change, message in (
        (of_lists, "it fails with prompt alone"),
        (halved, "its network is not given the latents as they are"),
        (timeless, "one argument of its network must change with the time, got none"),
        (squared, "timestep does not rise evenly with the time"),
    ):

        def changed_call(self, *args, change=change, **kwargs):
            args, kwargs = change(args, kwargs)
            return call(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(kind, "__call__", changed_call)
            refused(pipeline(), message)
    changed = pipeline()
    changed.vae.register_to_config(scaling_factor=3.0)
    # the pipeline reads it, too: what is decoded agrees
    assert isinstance(wrap(changed), Recorded)
    changed = pipeline()
    changed.vae.register_to_config(shift_factor=0.7)
    refused(changed, "what its VAE decodes is not its latents by their scale and shift")
    changed = pipeline()
    changed.vae.register_to_config(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    refused(changed, "what its VAE decodes is not its latents by their scale and shift")
    with pytest.raises(ModelError, match="trained guidance must go with a model that embeds it"):
        load(folders["chroma"], guidance=2.0)
    with pytest.raises(ModelError, match="density must go with a flow-matching model"):
        load(folders["pixart"], density="mode")
    assert load(folders["sana"], density="logit_normal").process.density == "logit_normal"
    # 8 by 8 latents, two by two to a token
    assert load(folders["chroma"], shift="resolution").process.tokens((4, 8, 8)) == 16


def test_captions_whose_ends_are_not_told_are_refused(folders, monkeypatch):
    pipeline = DiffusionPipeline.from_pretrained(folders["qwen"], local_files_only=True)
    encode = type(pipeline).encode_prompt

    def endless(self, *args, **kwargs):
        return encode(self, *args, **kwargs)[0], None

    forward = type(pipeline.transformer).forward

    def deaf(self, *args, **kwargs):
        return forward(self, *args, **kwargs | {"encoder_hidden_states_mask": None})

    deaf.__signature__ = inspect.signature(forward)
    with monkeypatch.context() as patched:
        patched.setattr(type(pipeline.transformer), "forward", deaf)
        with pytest.raises(ModelError, match="_mask does not hide what follows a caption"):
            wrap(pipeline)
    with monkeypatch.context() as patched:
        patched.setattr(type(pipeline), "encode_prompt", endless)
        with pytest.raises(ModelError, match="and no mask says where each ends"):
            wrap(pipeline)


def test_pipelines_that_are_refused_by_their_name(folders, tmp_path):
    for kind, message in (
        ("ZImagePipeline", "takes lists"),
        ("WanPipeline", "video"),
        ("HiDreamImagePipeline", "pass no gradient"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(ModelError, match=f"got '{kind}' .*{message}"):
            load(tmp_path)
    # and by what it does, had its name not been known
    with pytest.raises(
        ModelError, match=r"ZImagePipeline, .* its network is given x, a list with a part for each"
    ):
        Recorded.wrap(z_image())
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NewPipeline"}))
    with pytest.raises(
        ModelError, match="a NewPipeline must have a transformer or a unet and a vae"
    ):
        load(tmp_path)
    assert "| any other | Any other pipeline with a VAE" in table()
