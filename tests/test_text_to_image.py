"""Stable Diffusion loaded, read and refused; captions embedded, images encoded and drawn."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from numerics import relative_error
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import MAX_TOKENS, build_pipeline, load_tiny, shake_lora
from transformers import CLIPTextModel

from dtrak.models import load
from dtrak.models.denoiser import ModelError
from dtrak.models.lora import LoraError, lora_names, save_lora
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet
from dtrak.training.drawing import draw_all

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline


@pytest.fixture(scope="module")
def model(folder):
    return load_tiny(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder, message, error=ModelError, **options):
    with pytest.raises(error, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_loads_a_pipeline_and_its_adapter(folder, model, tmp_path):
    save_lora(model.module, tmp_path)
    loaded = load(folder, tmp_path)
    assert loaded.identity() == model.identity()
    assert set(loaded.identity()) == {"model", "lora", "vae", "text_encoder"}
    # latents of 8 x 8, a VAE that halves
    assert (loaded.channels, loaded.factor, loaded.size) == (3, 2, 16)
    assert loaded.process.num_timesteps == 1000
    # the betas of the base's own schedule, scaled linear
    ends = torch.tensor([0.00085, 0.012])
    assert relative_error(loaded.process.scheduler.betas[[0, -1]], ends) < 1e-6
    parts = (loaded.module, loaded.vae, loaded.text_encoder)
    assert not any(module.training for part in parts for module in part.modules())
    names = [n for part in parts for n, p in part.named_parameters() if p.requires_grad]
    assert names == loaded.parameters() == lora_names(model.module)
    assert (loaded.reads, loaded.encoding["vae"]) == ("captions", loaded.identity()["vae"])


def test_every_hash_follows_its_part(model, folder):
    other = load_tiny(folder)
    before = other.identity()
    with torch.no_grad():
        next(p for n, p in other.module.named_parameters() if "lora_A" in n)[0, 0] += 1
    changed = other.identity()
    assert [key for key in before if before[key] != changed[key]] == ["lora"]
    for key, part in (("vae", "vae"), ("text_encoder", "text_encoder"), ("model", "module")):
        other = load_tiny(folder)
        with torch.no_grad():
            name, parameter = next(iter(getattr(other, part).named_parameters()))
            assert "lora" not in name
            parameter.view(-1)[0] += 1
        changed = other.identity()
        assert [name for name in before if before[name] != changed[name]] == [key]


def test_a_half_precision_folder_is_read_in_full(folder, model, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    # as a hub download of that variant leaves it, with the text encoder under its usual name
    text = tmp_path / "half" / "text_encoder"
    (text / "model.fp16.safetensors").rename(text / "model.safetensors")
    loaded = load(tmp_path / "half").put_adapter(2)
    for part in (loaded.module, loaded.vae, loaded.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    expected = model.vae.encoder.conv_in.weight
    assert relative_error(loaded.vae.encoder.conv_in.weight, expected) < 1e-3


def test_embeds_as_the_text_encoder_does(folder, model):
    texts = ["a wave", "", "a wave", "fog"]
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    rows = []
    for text in texts:
        # the test's vocabulary is bytes: a letter that ends a word has the id 256 + byte letter
        row = model.tokenizer(text).input_ids
        assert len(row) <= MAX_TOKENS
        row += [model.tokenizer.pad_token_id] * (MAX_TOKENS - len(row))
        with torch.no_grad():
            rows.append(encoder(torch.tensor([row])).last_hidden_state[0])
    embedded = model.embed(texts, CPU)
    assert embedded.shape == (4, MAX_TOKENS, 12)
    assert relative_error(embedded, torch.stack(rows)) < 1e-6
    assert relative_error(embedded[0], embedded[3]) > 0.01


def test_every_caption_is_encoded_once(folder):
    model, seen = load_tiny(folder), []
    forward = model.text_encoder.forward

    def counting(ids, *args, **kwargs):
        seen.append(len(ids))
        return forward(ids, *args, **kwargs)

    model.text_encoder.forward = counting
    first = model.embed(["a", "b", "a"], CPU)
    assert torch.equal(model.embed(["b", "a"], CPU), first[[1, 0]])
    model.embed(["c"], CPU)
    assert seen == [2, 1]


def test_a_caption_that_is_too_long_is_cut_with_a_warning(model):
    long = "x" * 40
    with pytest.warns(
        UserWarning, match=r"captions have more than 16 tokens and are cut: 1 of.*'xxx"
    ):
        rows = model.tokenize(["fog", long])
    assert [len(row) for row in rows] == [MAX_TOKENS] * 2
    assert torch.equal(model.embed([long], CPU), model.embed([long + "y"], CPU))
    assert model.tokenize([]) == []


def test_encodes_as_the_vae_does(folder, model):
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    vae = AutoencoderKL.from_pretrained(folder / "vae").double().eval()
    with torch.no_grad():
        distribution = vae.encode(images.double()).latent_dist
    scale = vae.config.scaling_factor
    assert scale == 0.18215
    posterior = model.posterior(images, CPU)
    assert posterior.shape == (3, 2, 4, 8, 8)
    assert relative_error(posterior[:, 0], distribution.mode() * scale) < 1e-5
    assert relative_error(posterior[:, 1], distribution.std * scale) < 1e-5
    with pytest.raises(ValueError, match="sides that are multiples of 2, got 15x16 pixels"):
        model.posterior(images[..., :15], CPU)


def sample_by_hand(folder, model, prompt, seed, scale, steps):
    """DDIM with guidance, written out from the papers, in float64."""
    unet, vae = model.module.double(), AutoencoderKL.from_pretrained(folder / "vae").double()
    bars = model.process.scheduler.alphas_cumprod.double()
    text = model.embed([prompt, ""], CPU).double()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    stride = 1000 // steps
    for t in range((steps - 1) * stride + 1, 0, -stride):
        with torch.no_grad():
            with_prompt, without = (
                unet(x, torch.tensor(t), encoder_hidden_states=row[None]).sample for row in text
            )
        noise = without + scale * (with_prompt - without)
        # the last step goes to the first timestep, as Stable Diffusion's set_alpha_to_one says
        next_bar = bars[max(t - stride, 0)]
        clean = (x - (1 - bars[t]).sqrt() * noise) / bars[t].sqrt()
        x = next_bar.sqrt() * clean + (1 - next_bar).sqrt() * noise
    with torch.no_grad():
        image = vae.eval().decode(x / vae.config.scaling_factor).sample
    model.module.float()
    return image.clamp(-1, 1)[0]


def test_draws_by_ddim_with_guidance(folder):
    model, steps = load_tiny(folder), []
    images = draw_all(
        model,
        [3, 4],
        items=["fog", "sea"],
        guidance_scale=3.0,
        num_inference_steps=5,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert images.shape == (2, 3, 16, 16)
    assert steps == [(n, 5) for n in range(1, 6)]
    for image, prompt, seed in zip(images, ["fog", "sea"], [3, 4], strict=True):
        expected = sample_by_hand(folder, model, prompt, seed, 3.0, 5)
        assert relative_error(image, expected) < 1e-4


def test_a_picture_depends_on_its_prompt_seed_and_guidance_alone(folder):
    model = load_tiny(folder)

    def draw(prompts, seeds, **options):
        return draw_all(model, seeds, items=prompts, num_inference_steps=3, **options)

    two = draw(["fog", "sea"], [1, 2])
    assert relative_error(draw(["sea"], [2]), two[1:]) < 1e-5
    assert relative_error(draw(["fog", "sea"], [1, 2], batch_size=1), two) < 1e-5
    assert relative_error(draw(["fog"], [2]), two[1:]) > 1e-3
    assert relative_error(draw(["sea"], [2], guidance_scale=2.0), two[1:]) > 1e-4
    assert draw(["fog"], [1], size=(8, 24)).shape == (1, 3, 8, 24)
    shake_lora(model, seed=9)
    assert relative_error(draw(["sea"], [2]), two[1:]) > 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": [1, 2]}, "seeds must be 1, one for each prompt, got 2"),
        ({"seeds": [2**32]}, r"seeds must be in \[0, 2\*\*32\), got 4294967296"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number of at least 0"),
        ({"num_inference_steps": 0}, r"num_inference_steps must be in \[1, 1000\], got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"size": 15}, "size must be positive multiples of 2 pixels, got 15x15"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message, model):
    arguments = {"items": ["fog"], "seeds": [1]} | options
    with pytest.raises(ValueError, match=message):
        model.draw(**arguments)


def test_a_broken_picture_is_refused_by_its_seed(folder):
    model = load_tiny(folder)
    with torch.no_grad():
        model.module.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite image from seed 7"):
        draw_all(model, [7], items=["fog"], num_inference_steps=2)


def test_the_schedule_and_the_prediction_type_are_the_bases_own(tmp_path):
    scheduler = DDIMScheduler(beta_start=0.001, beta_end=0.02, prediction_type="v_prediction")
    model = load(build_pipeline(tmp_path / "sd", scheduler=scheduler)).put_adapter(1)
    assert isinstance(model.process.scheduler, DDPMScheduler)
    assert model.process.scheduler.config["prediction_type"] == "v_prediction"
    assert torch.equal(model.process.scheduler.betas, scheduler.betas)


def test_refuses_what_is_no_such_pipeline(copy, tmp_path, model, monkeypatch):
    refused(tmp_path / "none", "model must be a folder that Diffusers wrote", FileNotFoundError)
    # the hub's client may retry for minutes
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", _no_hub)
    refused("nobody/nothing", "cannot be downloaded: no such name", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"must be a folder with config\.json .* got .*empty without one")
    edit(copy / "model_index.json", _class_name="StableDiffusionUpscalePipeline")
    refused(copy, "could not be loaded: .*low_res_scheduler")
    edit(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    edit(copy / "unet" / "config.json", addition_embed_type="text_time")
    refused(copy, "must read captions and nothing else, got one with addition_embed_type")
    edit(copy / "unet" / "config.json", addition_embed_type=None)
    shutil.rmtree(copy / "vae")
    refused(copy, "must hold the folder vae")


def _no_hub(name):
    raise OSError("no such name")


def test_a_hub_name_is_downloaded_once_and_read(folder, monkeypatch):
    names = []
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.download", lambda name: names.append(name) or str(folder)
    )
    assert load("owner/name").put_adapter(1).size == 16
    assert names == ["owner/name"]


def test_refuses_parts_that_do_not_fit(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if n != "conv_in.weight"}, file)
    refused(copy, r"unet does not match its configuration: conv_in\.weight is missing")
    save_file(whole | {"conv_in.weight": torch.zeros(1, 4, 3, 3)}, file)
    refused(copy, r"conv_in\.weight is \[1, 4, 3, 3\] and should be \[8, 4, 3, 3\]")
    file.write_bytes(b"junk")
    refused(copy, "unet could not be loaded")
    save_file(whole, file)
    text = copy / "text_encoder" / "model.safetensors"
    words = load_file(text)
    name = next(name for name in words if "token_embedding" in name)
    save_file({n: t for n, t in words.items() if n != name}, text)
    refused(copy, "text_encoder does not match its configuration: .*token_embedding.*missing")
    save_file(words, text)
    (copy / "tokenizer" / "tokenizer_config.json").write_text("junk")
    for name in ("tokenizer.json", "vocab.json"):
        (copy / "tokenizer" / name).unlink(missing_ok=True)
    refused(copy, "the CLIPTokenizer in .* could not be loaded")


@pytest.mark.parametrize(
    "unet, message",
    [
        ({"in_channels": 9}, "must take and return the 4 channels of its VAE's latents, got 9 and"),
        ({"cross_attention_dim": 20}, "must read the 12 numbers per token of its text encoder"),
    ],
)
def test_refuses_parts_of_other_models(unet, message, tmp_path):
    refused(build_pipeline(tmp_path / "sd", **unet), message)


def test_refuses_an_adapter_trained_on_another_base(folder, model, tmp_path):
    save_lora(model.module, tmp_path / "lora")
    record = {"settings": {"model": model.identity()}}
    (tmp_path / "lora" / "training.json").write_text(json.dumps(record))
    load(folder, tmp_path / "lora")
    other = build_pipeline(tmp_path / "other", seed=1)
    refused(other, "must be of the base model in", LoraError, lora=tmp_path / "lora")
    # without that record only its shape can be told
    (tmp_path / "lora" / "training.json").unlink()
    load(other, tmp_path / "lora")


def test_an_unconditional_model_is_none(tmp_path):
    from tiny import tiny_unet

    UNet(tiny_unet(), linear_process()).save(tmp_path / "ddpm")
    assert load(tmp_path / "ddpm").reads is None
    refused(tmp_path / "ddpm", "--lora must go with a pipeline that takes one", lora=tmp_path)


def test_the_unet_is_the_bases(folder, model):
    """With the adapter's second factor at zero the model is the base."""
    fresh = load(folder).put_adapter(3)
    base = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 12)
    with torch.no_grad():
        assert torch.equal(fresh.module(x, t, text).sample, base(x, t, text).sample)
