"""Every kind of pipeline: features, conditions, latents and pictures against loops by hand.

The oracles call the networks of Diffusers with their arguments written out, one sample at a time,
in float64.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from numerics import relative_error
from safetensors.torch import load_file, save_file
from tiny_pipelines import CLASSES, KINDS, build, build_clip
from tiny_stable_diffusion import MAX_TOKENS, shake_lora
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dtrak.data.samples import Samples
from dtrak.features.extraction import FusedExtractor, extract_rows
from dtrak.features.noise import sample_noise
from dtrak.features.settings import FeatureSettings
from dtrak.models import load, wrap
from dtrak.models.denoiser import ModelError
from dtrak.models.lora import LoraError, remove_lora
from dtrak.training.drawing import draw_all
from dtrak_kernels import GradientSketcher, Projection, Whitening, project

CPU = torch.device("cpu")
# cut by a CLIP of 16 tokens, not by a T5
CAPTIONS = ["fog", "a sea of the old days", ""]
TIMES = (150, 730)
GUIDANCE = 2.0
# what all kinds have in common: a U-Net, and a transformer that is told its guidance
TELLING = [
    kind if kind in ("sd", "flux") else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS
]


@pytest.fixture(scope="module")
def folders(shared):
    def build_all(folder):
        for kind in KINDS:
            build(kind, folder / kind / "pipeline")

    return {kind: shared("kinds", build_all) / kind / "pipeline" for kind in KINDS}


def load_kind(folders, kind, adapter=False):
    options = {"guidance": GUIDANCE} if kind == "flux" else {}
    model = load(folders[kind], **options)
    return shake_lora(model.put_adapter(2)) if adapter else model


def items_of(kind):
    return [2, 0, 1] if kind == "dit" else CAPTIONS


def raw(folders, kind):
    """The pipeline as Diffusers reads it."""
    return DiffusionPipeline.from_pretrained(folders[kind], local_files_only=True)


def token_ids(tokenizer, caption, length):
    ids = tokenizer(caption).input_ids
    if len(ids) > length:
        ids = [*ids[: length - 1], ids[-1]]
    return torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids))])


@torch.no_grad()
def condition_by_hand(pipeline, kind, item):
    """What one sample is read with, from the encoders themselves."""
    if kind == "dit":
        return {"class_labels": torch.tensor([item])}
    clip = pipeline.text_encoder(
        token_ids(pipeline.tokenizer, item, MAX_TOKENS), output_hidden_states=True
    )
    if kind == "sd":
        return {"encoder_hidden_states": clip.last_hidden_state}
    if kind in ("flux", "schnell"):
        ids = token_ids(pipeline.tokenizer_2, item, 512 if kind == "flux" else 256)
        hidden = pipeline.text_encoder_2(ids).last_hidden_state
        return {"encoder_hidden_states": hidden, "pooled_projections": clip.pooler_output}
    second = pipeline.text_encoder_2(
        token_ids(pipeline.tokenizer_2, item, MAX_TOKENS), output_hidden_states=True
    )
    hidden = torch.cat([clip.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    if kind == "sdxl":
        return {"encoder_hidden_states": hidden, "text_embeds": second.text_embeds}
    t5 = pipeline.text_encoder_3(token_ids(pipeline.tokenizer_3, item, 256)).last_hidden_state
    padded = torch.zeros(1, MAX_TOKENS, t5.shape[-1])
    padded[..., : hidden.shape[-1]] = hidden
    return {
        "encoder_hidden_states": torch.cat([padded, t5], dim=1),
        "pooled_projections": torch.cat([clip.text_embeds, second.text_embeds], dim=-1),
    }


def sigma_of(kind, t):
    """Noise level of a flow; nothing for a discrete process."""
    u = (t + 1) / 1000
    # FLUX's shift depends on the resolution, which its training scripts leave out
    return {"sd3": 3 * u / (1 + 2 * u), "flux": u, "schnell": u}.get(kind)


def call_by_hand(network, kind, x, t, condition):
    """The network's output for one noisy sample ``[C, h, w]``, and nothing else of it."""
    sigma = sigma_of(kind, t)
    if kind in ("sd", "dit"):
        time = torch.tensor([t])
        if kind == "sd":
            return network(x[None], time, **condition).sample[0]
        return network(x[None], timestep=time, **condition).sample[0, :4]
    if kind == "sdxl":
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]], dtype=x.dtype)
        added = {"text_embeds": condition["text_embeds"], "time_ids": sizes}
        text = condition["encoder_hidden_states"]
        return network(
            x[None], torch.tensor([t]), encoder_hidden_states=text, added_cond_kwargs=added
        ).sample[0]
    if kind == "sd3":
        # float32, as schedulers have it
        return network(
            hidden_states=x[None], timestep=torch.tensor([sigma * 1000]), **condition
        ).sample[0]
    tokens, places = [], []
    for row in range(0, 8, 2):
        for column in range(0, 8, 2):
            tokens.append(x[:, row : row + 2, column : column + 2].reshape(-1))
            places.append([0, row // 2, column // 2])
    guidance = torch.tensor([GUIDANCE], dtype=x.dtype) if kind == "flux" else None
    text = condition["encoder_hidden_states"]
    packed = network(
        hidden_states=torch.stack(tokens)[None],
        timestep=torch.tensor([sigma]),
        guidance=guidance,
        img_ids=torch.tensor(places, dtype=x.dtype),
        txt_ids=torch.zeros(text.shape[1], 3, dtype=x.dtype),
        **condition,
    ).sample[0]
    rows = packed.reshape(4, 4, 4, 2, 2)
    return rows.permute(2, 0, 3, 1, 4).reshape(4, 8, 8)


def noisy_by_hand(kind, x, noise, t, betas):
    sigma = sigma_of(kind, t)
    if sigma is not None:
        return (1 - sigma) * x + sigma * noise, noise - x
    bar = torch.cumprod(1 - betas.double(), 0)[t]
    return bar.sqrt() * x + (1 - bar).sqrt() * noise, noise


def loop_by_hand(model, pipeline, kind, function, latents, names):
    """``[N, P]``: gradients of single samples by plain autograd."""
    network = model.module.double()
    chosen = {n: p for n, p in network.named_parameters() if n in names}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    betas = getattr(pipeline.scheduler, "betas", None)
    rows = []
    for index, item in enumerate(items_of(kind)):
        condition = {
            name: value.double() if value.is_floating_point() else value
            for name, value in condition_by_hand(pipeline, kind, item).items()
        }
        total = 0
        for t in TIMES:
            noise = sample_noise([f"{index}"], [t], (4, 8, 8), seed=0, dtype=torch.float64)[0, 0]
            noisy, target = noisy_by_hand(kind, latents[index].double(), noise, t, betas)
            u = call_by_hand(network, kind, noisy, t, condition)
            f = {"loss": (u - target).square().mean(), "mean_squared_l2_norm": u.square().mean()}
            total = total + f[function] / len(TIMES)
        grads = torch.autograd.grad(total, list(chosen.values()), allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(grads, chosen.values(), strict=True)
                ]
            )
        )
    return torch.stack(rows)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def samples_of(kind, latents):
    from dtrak.data.rows import InMemory

    pixels = torch.zeros(3, 3, 16, 16)
    data = Samples(pixels, ["0", "1", "2"], None, "latents", items_of(kind))
    return data.encoded(InMemory(latents))


@pytest.mark.sweep
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_gradients_of_single_samples(kind, adapter, folders, latents):
    function = "loss" if adapter else "mean_squared_l2_norm"
    model = load_kind(folders, kind, adapter)
    names = model.parameters()
    assert all(".lora_" in name for name in names) is adapter
    if not adapter:
        assert names == [name for name, _ in model.module.named_parameters()]
    pipeline = raw(folders, kind)
    pipeline.set_progress_bar_config(disable=True)
    expected = loop_by_hand(
        load_kind(folders, kind, adapter), pipeline, kind, function, latents, names
    )
    settings = FeatureSettings(function, TIMES, 0, Projection("none"), "float64")
    extractor = FusedExtractor(model, settings, CPU)
    data = samples_of(kind, latents)
    features = extract_rows(extractor, data, slice(0, 3))
    assert torch.isfinite(features).all()
    # noise levels and embeddings are float32
    assert relative_error(features, expected) < 1e-5
    apart = torch.cat([extract_rows(extractor, data, slice(i, i + 1)) for i in range(3)])
    assert relative_error(apart, features) < 1e-7
    sketched = FeatureSettings(function, TIMES, 0, Projection("sjlt", 512), "float64")
    extractor = FusedExtractor(model, sketched, CPU)
    features = extract_rows(extractor, data, slice(0, 3))
    shapes = extractor.sketcher.shapes
    assert relative_error(features, project(expected, sketched.projection, shapes=shapes)) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dit"])
def test_captions_are_read_as_the_pipeline_reads_them(kind, folders):
    model, pipeline = load_kind(folders, kind), raw(folders, kind)
    found = model.condition([*CAPTIONS, CAPTIONS[0]], CPU)
    for row, caption in enumerate(CAPTIONS):
        expected = condition_by_hand(pipeline, kind, caption)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][row].shape == value[0].shape
            assert relative_error(found[name][row], value[0]) < 1e-5, name
    for value in found.values():
        assert torch.equal(value[0], value[3])
    # every caption is read by every encoder, its tokens part of the identity
    assert model.identify_items(["fog"]) != model.identify_items(["fig"])
    with pytest.raises(ValueError, match="captions must be given for a model that reads them"):
        model.condition(None, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_shifted_and_scaled(kind, folders):
    model, vae = load_kind(folders, kind), raw(folders, kind).vae.double()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(pixels.double()).latent_dist.mode()
    shift, scale = (0.1, 1.5) if kind in ("sd3", "flux", "schnell") else (0.0, 0.18215)
    assert relative_error(model.inputs(pixels, CPU), (mode - shift) * scale) < 1e-5
    assert model.input_shape((3, 16, 16)) == (4, 8, 8)
    said = {"vae", "scaling_factor"} | ({"shift_factor"} if shift else set())
    assert model.encoding.keys() == said
    step = 2 if kind in ("sd", "sdxl") else 4
    for side in (17, 0, *([18] if step == 4 else [])):
        with pytest.raises(ValueError, match=f"sides that are multiples of {step}, got {side}x16"):
            model.input_shape((3, 16, side))


def draw_by_hand(folders, kind, seed, item, guidance, steps):
    """Classifier-free guidance and the sampler, written out, in float64."""
    pipeline = raw(folders, kind)
    network = load_kind(folders, kind).module.double()
    bars = None
    if kind in ("sdxl", "dit"):
        bars = torch.cumprod(1 - pipeline.scheduler.betas.double(), 0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 8, 8, generator=generator)[0].double()

    def conditions(item):
        return {
            name: value.double() if value.is_floating_point() else value
            for name, value in condition_by_hand(pipeline, kind, item).items()
        }

    def velocity(x, t, time=None):
        with torch.no_grad():
            told = call_by_hand(network, kind, x, t, conditions(item))
            if kind in ("flux", "schnell") or guidance <= 1:
                return told
            if kind == "sdxl":
                # the pipeline's answer to no prompt
                nothing = {name: 0 * value for name, value in conditions("fog").items()}
            else:
                nothing = conditions(CLASSES if kind == "dit" else "")
            untold = call_by_hand(network, kind, x, t, nothing)
        return untold + guidance * (told - untold)

    stride = 1000 // steps
    if bars is not None:
        offset = 1 if kind == "sdxl" else 0
        for t in range((steps - 1) * stride + offset, -1, -stride):
            noise = velocity(x, t)
            clean = (x - (1 - bars[t]).sqrt() * noise) / bars[t].sqrt()
            # set_alpha_to_one
            after = bars[t - stride] if t - stride >= 0 else torch.tensor(1.0).double()
            x = after.sqrt() * clean + (1 - after).sqrt() * noise
    else:
        x = flow_by_hand(network, kind, x, conditions, item, guidance, steps)
    config = pipeline.vae.config
    with torch.no_grad():
        image = (
            pipeline.vae.double()
            .decode(x[None] / config.scaling_factor + (config.shift_factor or 0.0))
            .sample[0]
        )
    return image.clamp(-1, 1)


def levels_by_hand(kind, steps):
    """The σ that a pipeline steps through."""
    if kind == "sd3":
        # the ends are shifted, and all of it is again
        first, last = 1.0, 3 * 0.001 / (1 + 2 * 0.001)
        levels = np.linspace(first, last, steps)
        return [*(3 * levels / (1 + 2 * levels)), 0.0]
    levels = np.linspace(1, 1 / steps, steps)
    if kind == "schnell":
        return [*levels, 0.0]
    mu = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
    return [*(math.exp(mu) / (math.exp(mu) + 1 / levels - 1)), 0.0]


def flow_by_hand(network, kind, x, conditions, item, guidance, steps):
    """Euler's method; FLUX is told the guidance, SD3 guided without a classifier."""
    sigmas = levels_by_hand(kind, steps)
    for now, after in pairwise(sigmas):
        told = call_at(network, kind, x, now, conditions(item), guidance)
        v = told
        if kind == "sd3":
            untold = call_at(network, kind, x, now, conditions(""), guidance)
            v = untold + guidance * (told - untold)
        x = x + (after - now) * v
    return x


def call_at(network, kind, x, sigma, condition, guidance):
    """`call_by_hand` at a noise level that is no timestep."""
    with (
        torch.no_grad(),
        mock.patch(f"{__name__}.sigma_of", return_value=sigma),
        mock.patch(f"{__name__}.GUIDANCE", guidance),
    ):
        return call_by_hand(network, kind, x, 0, condition)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sd"])
def test_pictures_are_drawn_by_the_kinds_own_sampler(kind, folders):
    model, item = load_kind(folders, kind), items_of(kind)[0]
    guidance = 0.0 if kind == "schnell" else 3.0
    seen = []
    drawn = list(
        model.draw(
            [7, 8],
            [item, items_of(kind)[1]],
            num_inference_steps=4,
            guidance_scale=guidance,
            size=16,
            trajectories=True,
            progress=lambda done, total: seen.append((done, total)),
        )
    )
    assert seen == [(n, 4) for n in range(1, 5)]
    assert drawn[0].images.shape == (2, 3, 16, 16)
    assert drawn[0].trajectories.shape == (2, 4, 4, 8, 8)
    expected = draw_by_hand(folders, kind, 7, item, guidance, 4)
    assert relative_error(drawn[0].images[0], expected) < 1e-4
    # the last clean latents are those that were decoded
    vae = raw(folders, kind).vae
    with torch.no_grad():
        last = drawn[0].trajectories[:, -1] / vae.config.scaling_factor
        decoded = vae.decode(last + (vae.config.shift_factor or 0.0)).sample.clamp(-1, 1)
    if kind != "sdxl":
        # whose schedule ends a step before the last timestep
        assert relative_error(drawn[0].images, decoded) < 1e-4
    alone = draw_all(
        model,
        [8],
        items=[items_of(kind)[1]],
        num_inference_steps=4,
        guidance_scale=guidance,
        size=16,
    )
    assert relative_error(alone[0], drawn[0].images[1]) < 1e-4


DRAWN = {"sd": (7.5, 50), "sdxl": (5.0, 50), "dit": (4.0, 50), "sd3": (7.0, 28), "flux": (3.5, 28)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_its_own_guidance_and_steps(kind, folders, monkeypatch):
    model, seen = load_kind(folders, kind), {}
    found = model.guidance_scale, model.num_inference_steps
    assert found == DRAWN.get(kind, (None, 4))

    def spy(self, pipeline, items, size, generators, options):
        seen.update(options)
        return torch.zeros(len(items), 3, *size)

    monkeypatch.setattr(type(model), "_run", spy)
    draw_all(model, [0], items=items_of(kind)[:1], size=16)
    assert seen == {"guidance_scale": found[0] or 0.0, "num_inference_steps": found[1]}


def test_what_a_kind_does_not_draw_is_refused(folders):
    schnell, dit = load_kind(folders, "schnell"), load_kind(folders, "dit")
    with pytest.raises(ValueError, match="must be None or 0 for a model without guidance, got 2"):
        schnell.draw([0], ["fog"], guidance_scale=2.0)
    with pytest.raises(ValueError, match="size must be that of the model, 16 pixels, got 8"):
        dit.draw([0], [1], size=8)
    for label in (CLASSES, -1, 1.5, "1", True):
        with pytest.raises(ValueError, match=r"labels must be whole numbers in \[0, 3\)"):
            dit.draw([0], [label])
    with pytest.raises(ValueError, match="labels must be 2, one for each seed, got none"):
        dit.draw([0, 1])
    for kind, step in (("sdxl", 2), ("sd3", 4), ("flux", 4)):
        for size in (0, 15, (16, 10 if step == 4 else 9)):
            with pytest.raises(ValueError, match=f"positive multiples of {step} pixels"):
                load_kind(folders, kind).draw([0], ["fog"], size=size)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_drawing_goes_through_the_nearest_timesteps(kind, folders):
    model = load_kind(folders, kind)
    if kind == "flux":
        # of 16 tokens
        type(model).size, before = 16, type(model).size
    try:
        found = model.drawing_timesteps(4)
    finally:
        if kind == "flux":
            type(model).size = before
    table = np.array([sigma_of(kind, t) for t in range(1000)])
    expected = [int(np.abs(table - level).argmin()) for level in levels_by_hand(kind, 4)[:-1]]
    assert found == expected


@pytest.mark.parametrize("kind", TELLING)
def test_a_whole_model_is_written_and_made_anew(kind, folders, tmp_path):
    model = load_kind(folders, kind)
    draw_all(model, [0], items=items_of(kind)[:1], size=16, num_inference_steps=1)
    fresh, again = model.fresh(1), model.fresh(1)
    assert fresh.identity() == again.identity()
    changed = {k for k, v in model.identity().items() if fresh.identity()[k] != v}
    assert changed == {"model"}
    assert fresh.parameters() == model.parameters()
    fresh.save(tmp_path / "fresh")
    options = {"guidance": GUIDANCE} if kind == "flux" else {}
    loaded = load(tmp_path / "fresh", **options)
    assert loaded.identity() == fresh.identity()
    assert loaded.process.describe() == model.process.describe()
    with torch.no_grad():
        next(fresh.module.parameters()).add_(1)
    # a whole model may be trained: its hash is made each time
    assert fresh.identity()["model"] != loaded.identity()["model"]
    before = fresh.put_adapter(2).base_identity()["model"]
    remove_lora(fresh.module)
    with torch.no_grad():
        next(fresh.module.parameters()).add_(1)
    assert fresh.put_adapter(2).base_identity()["model"] != before
    assert model.identity() == load_kind(folders, kind).identity()


@pytest.mark.parametrize("kind", TELLING)
def test_an_adapter_is_written_and_read(kind, folders, tmp_path):
    model = load_kind(folders, kind, adapter=True)
    model.save(tmp_path / "lora")
    options = {"guidance": GUIDANCE} if kind == "flux" else {}
    loaded = load(folders[kind], tmp_path / "lora", **options)
    assert loaded.identity() == model.identity()
    assert loaded.parameters() == model.parameters()
    trainable = [n for n, p in loaded.module.named_parameters() if p.requires_grad]
    assert trainable == loaded.parameters()
    assert loaded.base_identity() == load_kind(folders, kind).identity()
    if kind != "dit":
        # as Diffusers reads it
        pipeline = raw(folders, kind)
        pipeline.load_lora_weights(tmp_path / "lora")
        network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        found = {n: p for n, p in network.named_parameters() if ".lora_" in n}
        assert len(found) == len(model.parameters())
        for name, value in found.items():
            own = model.module.get_parameter(name.replace("default_0", "dtrak"))
            assert torch.equal(value, own)


def test_zero_gradients_stay_zero(folders, latents):
    """The query LoRA of the text in SD3's last block reaches no output."""
    model = load_kind(folders, "sd3")
    model.put_adapter(2, targets=["add_q_proj", "to_q"])
    shake_lora(model)
    names = model.parameters()
    last = [name for name in names if "blocks.1" in name and "add_q_proj" in name]
    assert len(last) == 2
    settings = FeatureSettings("loss", TIMES, 0, Projection("none"))
    extractor = FusedExtractor(model, settings, CPU)
    features = extract_rows(extractor, samples_of("sd3", latents), slice(0, 3))
    assert torch.isfinite(features).all()
    parameters = dict(model.module.named_parameters())
    parts = features.split([parameters[name].numel() for name in names], dim=1)
    for name, part in zip(names, parts, strict=True):
        assert bool(part.any()) is (name not in last), name
    # nor does whitening, which divides by what gradients are like
    noisy, times = torch.randn(3, 4, 8, 8), torch.tensor([100, 500, 900])
    condition = model.condition(CAPTIONS, CPU)

    def outputs():
        return model.predict(noisy, times, condition).square().flatten(1).mean(1)

    for kind in ("scale", "lowrank", "kfac"):
        whitening = Whitening.fit(model.module, [(outputs, 3)], kind=kind, parameters=names)
        sketcher = GradientSketcher(
            model.module, Projection("none"), parameters=names, whitening=whitening
        )
        features = sketcher.sketch(outputs, 3)
        assert torch.isfinite(features).all()
        parts = features.split([parameters[name].numel() for name in names], dim=1)
        assert [bool(part.any()) for part in parts] == [name not in last for name in names]


def test_the_guidance_a_model_was_trained_with_is_told(folders, latents):
    default, other = load(folders["flux"]), load_kind(folders, "flux")
    assert default.guidance == 3.5
    assert default.identity()["guidance"] == "3.5"
    settings = FeatureSettings("loss", TIMES, 0, Projection("none"))
    rows = [
        extract_rows(FusedExtractor(m, settings, CPU), samples_of("flux", latents), slice(0, 1))
        for m in (default, other)
    ]
    assert relative_error(*rows) > 1e-3
    for kind in ("schnell", "sd3", "sdxl", "dit"):
        with pytest.raises(ModelError, match="guidance must go with a model that embeds it, got 2"):
            load(folders[kind], guidance=2.0)


def test_how_a_flow_is_trained(folders):
    found = {kind: load(folders[kind]).process for kind in ("sd3", "flux", "schnell")}
    assert {kind: p.density for kind, p in found.items()} == {
        "sd3": "logit_normal",
        "flux": "uniform",
        "schnell": "uniform",
    }
    chosen = load(folders["flux"], density="mode", weighting="cosmap", shift="resolution").process
    assert (chosen.density, chosen.weighting, chosen.shift) == ("mode", "cosmap", "resolution")
    mu = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
    expected = math.exp(mu) / (math.exp(mu) + 1 / 0.5 - 1)
    assert math.isclose(chosen.levels([499], (4, 8, 8))[0], expected, rel_tol=1e-5)
    with pytest.raises(ModelError, match="density must go with a flow-matching model"):
        load(folders["sdxl"], density="mode")
    with pytest.raises(ModelError, match="shift must be 'scheduler' for a schedule without"):
        load(folders["sd3"], shift="resolution")


def test_the_table_in_the_docs_is_the_registrys():
    from dtrak.models import _KINDS, _REFUSED
    from dtrak.pages.support import table

    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    start, end = "<!-- python -m dtrak.pages.support -->\n", "<!-- end -->"
    assert page.partition(start)[2].partition(end)[0] == table()
    assert all(f"`{name}`" in table() for name in _KINDS)
    # what is refused is refused with its reason, and nothing of both
    names = [name for group in _REFUSED for name in group.split(", ")]
    assert not [(k, name) for k in _KINDS for name in names if k.startswith(name)]


@pytest.mark.parametrize("kind, other", [("sdxl", "sd3"), ("dit", "flux"), ("sd3", "sdxl")])
def test_a_schedule_of_another_process_is_refused(kind, other, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    shutil.rmtree(folder / "scheduler")
    shutil.copytree(folders[other] / "scheduler", folder / "scheduler")
    with pytest.raises(ModelError, match=r"names a \w+ as its scheduler, but .* a \w+"):
        load(folder)


@pytest.mark.parametrize("kind", TELLING)
def test_a_pipeline_in_memory_is_the_one_in_its_folder(kind, folders, tmp_path):
    options = {"guidance": GUIDANCE} if kind == "flux" else {}
    wrapped, loaded = wrap(raw(folders, kind), **options), load_kind(folders, kind)
    assert wrapped.identity() == loaded.identity()
    assert wrapped.process.describe() == loaded.process.describe()
    trained = load_kind(folders, kind, adapter=True)
    trained.save(tmp_path)
    if kind == "dit":
        return
    pipeline = raw(folders, kind)
    pipeline.load_lora_weights(tmp_path)
    wrapped = wrap(pipeline, **options)
    assert wrapped.identity() == trained.identity()
    assert len(wrapped.parameters()) == len(trained.parameters())
    assert wrapped.adapter() == trained.adapter()
    assert trained.adapter()["rank"] == 2
    pipeline.load_lora_weights(tmp_path, adapter_name="other")
    with pytest.raises(LoraError, match="must have one adapter, got default_0, other"):
        wrap(pipeline)
    pipeline.delete_adapters("other")
    pipeline.fuse_lora()
    with pytest.raises(LoraError, match="merged or disabled"):
        wrap(pipeline)


def test_a_pipeline_in_memory_must_be_whole(folders):
    pipeline = raw(folders, "sd3")
    pipeline.text_encoder_2 = None
    with pytest.raises(
        ModelError, match="the StableDiffusion3Pipeline must have its text_encoder_2"
    ):
        wrap(pipeline)
    with pytest.raises(ModelError, match=r"must be a pipeline such as .*, got a Linear"):
        wrap(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "kind",
    [
        "flux",
        "dit",
        *(pytest.param(kind, marks=pytest.mark.full) for kind in ("sd", "sdxl", "sd3", "schnell")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")
def test_a_kind_is_explained_in_a_notebook(kind, folders, monkeypatch):
    """A pipeline in memory, or a folder and its adapter; pictures drawn, or given."""
    import dtrak

    # instead of 50
    monkeypatch.setattr("dtrak.models.denoiser.Denoiser.num_inference_steps", 4)
    adapter = kind in ("sd", "flux")
    model = load_kind(folders, kind, adapter) if adapter else raw(folders, kind)
    flux = kind in ("flux", "schnell")
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    read = {"labels" if kind == "dit" else "captions": items_of(kind)}
    data = dtrak.images(pixels, ids=list("abc"), **read)
    how = {"timesteps": 2, "proj_dim": 256, "damping": 0.5, "device": "cpu", "progress": False}
    how["whiten"] = "none"
    drawn = {"classes": [1]} if kind == "dit" else {"prompts": ["fog"]}
    # FLUX's pictures have a size of their own
    queries = dtrak.images(pixels[:1], ids=["q"], captions=["fog"]) if flux else 1
    found = dtrak.explain(model, data, queries, **how, **({} if flux else drawn))
    assert found.scores.shape == (1, 3)
    own = load_kind(folders, kind, adapter) if kind != "flux" else model
    if flux:
        query, name, item = pixels[:1], "q", "fog"
    else:
        query = draw_all(own, [0], items=[1 if kind == "dit" else "fog"])
        query = ((query + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        name, item = "00000.png", 1 if kind == "dit" else "fog"
    times = tuple(own.process.spread(2))
    settings = FeatureSettings("mean_squared_l2_norm", times, 0, Projection("sjlt", 256))
    extractor = FusedExtractor(own, settings, CPU)
    names = ["train/a", "train/b", "train/c"]
    phi = extractor.extract(own.inputs(pixels, CPU), names, items_of(kind)).double()
    psi = extractor.extract(own.inputs(query, CPU), [f"query/{name}"], [item]).double()
    wanted = psi @ torch.linalg.inv(phi.T @ phi + 0.5 * torch.eye(256).double()) @ phi.T
    assert relative_error(found.scores.double(), wanted) < 1e-3


def test_pictures_larger_than_a_network_has_places_for(folders):
    model = load_kind(folders, "sd3")
    assert model.input_shape((3, 32, 32)) == (4, 16, 16)
    with pytest.raises(ValueError, match=r"at most 32 pixels, whose places .* got 36x32 pixels"):
        model.input_shape((3, 32, 36))


def test_what_a_model_reads_must_be_given(folders):
    import dtrak

    pixels = torch.zeros(2, 3, 16, 16)
    for kind, message in (("sd3", "must have captions"), ("dit", "must have labels")):
        with pytest.raises(ValueError, match=message):
            dtrak.explain(load_kind(folders, kind), pixels, pixels, progress=False, device="cpu")


@pytest.mark.parametrize("kind", ["flux", pytest.param("sd3", marks=pytest.mark.full), "sd"])
def test_a_large_network_is_kept_in_16_bits_beside_its_adapter(kind, folders, latents, monkeypatch):
    data, model = samples_of(kind, latents), load_kind(folders, kind, adapter=True)
    exact = FeatureSettings("loss", TIMES, 0, Projection("none"))
    expected = extract_rows(FusedExtractor(model, exact, CPU), data, slice(0, 3))
    model.checkpointing = True
    # activations that are made again are the same
    again = extract_rows(FusedExtractor(model, exact, CPU), data, slice(0, 3))
    assert model.module.is_gradient_checkpointing
    assert torch.equal(again, expected)
    model.checkpointing = False
    model.to(CPU)
    assert not model.module.is_gradient_checkpointing
    monkeypatch.setattr("dtrak.models.denoiser._LARGE", 1000)
    model.checkpointing = None
    identity = model.identity()
    half = FeatureSettings("loss", TIMES, 0, Projection("none"), "bfloat16")
    extractor = FusedExtractor(model, half, CPU)
    assert model.module.is_gradient_checkpointing
    found = {n: p.dtype for n, p in model.module.named_parameters()}
    assert {d for n, d in found.items() if ".lora_" not in n} == {torch.bfloat16}
    assert {d for n, d in found.items() if ".lora_" in n} == {torch.float32}
    assert model.identity() == identity
    features = extract_rows(extractor, data, slice(0, 3))
    assert 0 < relative_error(features, expected) < 0.1
    model.to(CPU)
    drawn = draw_all(model, [0], items=["fog"], num_inference_steps=2, size=16)
    assert torch.isfinite(drawn).all()
    with pytest.raises(ModelError, match="was made bfloat16 and must be loaded again for float32"):
        FusedExtractor(model, exact, CPU)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_training_descends_the_kinds_own_loss(kind, folders, monkeypatch):
    """Of the velocity, at timesteps of its density, weighed as chosen; of ε elsewhere."""
    from dtrak.training.recipe import Recipe
    from dtrak.training.trainer import Trainer, train

    options = {} if kind == "sdxl" else {"weighting": "cosmap", "density": "mode"}
    options |= {"guidance": GUIDANCE} if kind == "flux" else {}
    model, seen, losses = load(folders[kind], **options), [], []
    adds, descends = type(model.process).add, Trainer.descend

    def spy(self, clean, noise, timesteps):
        seen.append((clean, noise, timesteps))
        return adds(self, clean, noise, timesteps)

    def note(self, loss, step, steps):
        losses.append(float(loss.detach()))
        return descends(self, loss, step, steps)

    monkeypatch.setattr(type(model.process), "add", spy)
    monkeypatch.setattr(Trainer, "descend", note)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    data = Samples(pixels, list("abc"), None, "pictures", CAPTIONS)
    train(model, data, Recipe(steps=1, batch_size=3, flip=False))
    ((clean, noise, timesteps),) = seen
    latents = load(folders[kind]).inputs(pixels, CPU)
    network, pipeline = load(folders[kind]).module.double(), raw(folders, kind)
    betas, total = getattr(pipeline.scheduler, "betas", None), 0.0
    for row, t in enumerate(timesteps.tolist()):
        # the batch is shuffled
        index = int((latents - clean[row]).flatten(1).norm(dim=1).argmin())
        condition = condition_by_hand(pipeline, kind, CAPTIONS[index])
        condition = {name: value.double() for name, value in condition.items()}
        x, e = latents[index].double(), noise[row].double()
        noisy, target = noisy_by_hand(kind, x, e, t, betas)
        with torch.no_grad():
            error = call_by_hand(network, kind, noisy, t, condition) - target
        sigma = sigma_of(kind, t)
        weight = 1 if sigma is None else 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        total += weight * float(error.square().mean()) / 3
    assert losses == [pytest.approx(total, rel=1e-4)]
    if kind != "sdxl":
        draws = type(model.process).draw_timesteps
        monkeypatch.setattr(type(model.process), "draw_timesteps", lambda *_: draws(*_) * 0 + 7)
        seen.clear()
        train(load(folders[kind], **options), data, Recipe(steps=1, batch_size=3, flip=False))
        assert seen[0][2].tolist() == [7, 7, 7]


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_that_is_not_whole_is_refused_by_name(folders, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "sd3")

    def refused(message):
        with pytest.raises(ModelError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)

    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    weights.unlink()
    refused("the model in .*transformer could not be loaded: .*no file named diffusion_pytorch")
    name = next(name for name in whole if "add_q_proj" in name)
    save_file({n: w for n, w in whole.items() if n != name}, weights)
    refused(f"transformer does not match its configuration: {re.escape(name)} is missing")
    save_file(whole | {name: torch.zeros(3)}, weights)
    refused(r"is \[3\] and should be")
    save_file(whole, weights)
    edit(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    refused("must describe a AutoencoderKL, got a AutoencoderTiny")
    edit(folder / "vae" / "config.json", _class_name="AutoencoderKL")
    text = folder / "text_encoder_2" / "model.safetensors"
    kept = load_file(text)
    save_file({n: w for n, w in kept.items() if "token_embedding" not in n}, text)
    refused("text_encoder_2 does not match its configuration: .*token_embedding.*missing")
    save_file(kept, text)
    shutil.rmtree(folder / "text_encoder_3")
    refused("must hold the folder text_encoder_3")
    # which may be left out, and is then said to be
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    model = load(folder)
    assert "text_encoder_3" not in model.identity()
    read = model.condition(["fog"], CPU)["encoder_hidden_states"]
    assert read.shape == (1, MAX_TOKENS + 256, 24)
    assert not read[:, MAX_TOKENS:].any()
    edit(folder / "model_index.json", transformer=["diffusers", "NoSuchModel"], vae=5)
    refused("names a NoSuchModel as its transformer, but|must")
    edit(folder / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"])
    shutil.rmtree(folder / "scheduler")
    refused(r"is a pipeline and must hold scheduler/scheduler_config\.json")


@pytest.mark.parametrize("kind, other", [("flux", "sd3"), ("sdxl", "sd"), ("sd3", "flux")])
def test_parts_of_another_model_are_refused(kind, other, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    network = "unet" if kind == "sdxl" else "transformer"
    shutil.rmtree(folder / network)
    shutil.copytree(folders[other] / network, folder / network)
    with pytest.raises(
        ModelError, match=r"as its transformer, but|must have addition_embed_type"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_text_encoders_of_another_model_are_refused(kind, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    part = "text_encoder" if kind == "flux" else "text_encoder_2"
    clip = build_clip(4, 4, CLIPTextModel if kind == "flux" else CLIPTextModelWithProjection)
    clip.save_pretrained(folder / part)
    with pytest.raises(
        ModelError, match=r"must read the \d+ (pooled numbers|numbers per token) of"
    ):
        load(folder)


def test_half_precision_folders_are_read_in_full(folders, tmp_path):
    """As a hub download of that variant leaves them."""
    raw(folders, "sd3").to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    loaded, model = load(tmp_path / "half"), load_kind(folders, "sd3")
    for part in (loaded.module, loaded.vae, *loaded.encoders.values()):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    weight = loaded.module.proj_out.weight
    assert 0 < relative_error(weight, model.module.proj_out.weight) < 1e-3


@pytest.mark.full
def test_loading_says_nothing(folders):
    script = "import sys; from dtrak.models import load; [load(folder) for folder in sys.argv[1:]]"
    places = [str(folders[kind]) for kind in ("sdxl", "sd3", "flux", "dit")]
    done = subprocess.run([sys.executable, "-c", script, *places], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_too_long_is_said_of_each_reader(folders):
    model = load_kind(folders, "flux")
    with pytest.warns(
        UserWarning, match="captions have more than 16 tokens of CLIP.* and are cut: 1 of"
    ):
        model.identify_items(["x" * 40, "fog"])
    with pytest.warns(UserWarning, match="more than 512 tokens of T5"):
        model.identify_items(["a b " * 200])


def test_captions_embedded_ahead_are_not_embedded_again(folders, monkeypatch):
    model, expected = load_kind(folders, "sd3"), load_kind(folders, "sd3").condition(CAPTIONS, CPU)
    model.embed_ahead([*CAPTIONS, *CAPTIONS], CPU)
    monkeypatch.setattr(type(model), "_encode", None)
    for name, value in model.condition(CAPTIONS, CPU).items():
        assert relative_error(value, expected[name]) < 1e-6
    # no room: nothing is kept, and nothing goes wrong
    monkeypatch.undo()
    monkeypatch.setattr("dtrak.models.latent._KEPT_BYTES", 0)
    monkeypatch.setattr("dtrak.models.latent.available_bytes", lambda device: 0)
    model = load_kind(folders, "sd3")
    model.embed_ahead(CAPTIONS, CPU)
    assert not model._embeddings
    for name, value in model.condition(CAPTIONS, CPU).items():
        assert relative_error(value, expected[name]) < 1e-6


@pytest.mark.sweep
@pytest.mark.parametrize("way", ["kept", "checkpointing"])
@pytest.mark.parametrize(
    "kind, adapter, dtype",
    [
        ("dit", False, None),
        ("sd3", True, "bfloat16"),
        *(
            pytest.param(kind, *how, marks=pytest.mark.full)
            for kind in ("sdxl", "sd3", "flux")
            for how in ((False, None), (True, "bfloat16"))
        ),
    ],
)
def test_memory_is_what_is_measured(kind, adapter, dtype, way, folders):
    from dtrak.runs.measure import TensorMeter

    model = load_kind(folders, kind, adapter)
    model.checkpointing = way == "checkpointing"
    model.to(CPU, dtype)
    condition = model.condition(items_of(kind), CPU)
    noisy, times = torch.randn(3, 4, 8, 8), torch.tensor([150, 730, 20])
    names = model.parameters()
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name in names)

    def f():
        with model._autocast():
            output = model.predict(noisy, times, condition)
        return output.float().square().flatten(1).mean(1)

    sketcher = GradientSketcher(model.module, Projection("sjlt", 1024), parameters=names)
    plan = sketcher.plan(f, 3)
    assert bool(plan.memory.checkpointed) == model.checkpointing
    known = [noisy, times, *condition.values(), *model.module.state_dict().values()]
    # signs and places are made once
    sketcher.sketch(f, 3)
    with TensorMeter(known=known) as meter:
        sketcher.sketch(f, 3)
    assert plan.memory.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.1)
    features = 3 * sketcher.proj_dim * 4
    with TensorMeter(known=known) as meter, sketcher.batch(3):
        held = f()
        alive = meter.live_bytes - features
    assert held.requires_grad
    assert plan.memory.activation_bytes == pytest.approx(alive, rel=0.1)
