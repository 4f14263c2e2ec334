"""Latents kept on disk, and features of text-to-image models: fused, and as published."""

import pytest
import torch
from numerics import relative_error
from tiny_stable_diffusion import load_tiny, write_pictures

from dtrak.data.captions import load_captions
from dtrak.data.images import load_data
from dtrak.data.rows import InMemory
from dtrak.data.samples import Samples
from dtrak.features.extraction import (
    FeatureSettings,
    FusedExtractor,
    deciding_settings,
    extract_rows,
    fill_store,
)
from dtrak.features.latents import fill_latents, open_latents, read_latents, read_posteriors
from dtrak.features.store import StoreError
from dtrak.models import load
from dtrak.runs.folders import describe_differences
from dtrak_kernels import Projection, project

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline


@pytest.fixture(scope="module")
def model(folder):
    return load_tiny(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return load_data(write_pictures(tmp_path_factory.mktemp("data") / "pictures"))


@pytest.fixture(scope="module")
def captions(pictures):
    return ["a", "b c", "", "a", "long ago"]


@pytest.fixture(scope="module")
def latents(model, pictures, captions, tmp_path_factory):
    store = open_latents(tmp_path_factory.mktemp("latents"), model, pictures)
    fill_latents(store, model, pictures, CPU)
    return read_latents(store, model, pictures.conditioned(captions))


def settings(kind="none", dtype="float64", function="mean_squared_l2_norm"):
    proj_dim = 0 if kind == "none" else 1024
    return FeatureSettings(function, (3, 400, 950), 5, Projection(kind, proj_dim, 3), dtype)


def test_latents_are_the_posteriors_mode(model, pictures, captions, latents):
    assert (
        relative_error(latents.batch(slice(None)), model.posterior(pictures.images, CPU)[:, 0])
        < 1e-6
    )
    assert latents.batch(slice(None)).shape == (5, 4, 8, 8)
    assert latents.ids == pictures.ids
    assert latents.conditions == captions
    chosen = latents.select([3, 1])
    assert (chosen.ids, chosen.conditions) == ([pictures.ids[3], pictures.ids[1]], ["a", "b c"])
    assert torch.equal(chosen.batch([0, 1]), latents.batch([3, 1]))


def test_a_second_run_encodes_nothing(model, pictures, captions, latents, tmp_path, monkeypatch):
    store, seen = open_latents(tmp_path, model, pictures), []
    fill_latents(store, model, pictures, CPU, progress=lambda done, total: seen.append(done))
    assert seen == [0, 4, 5]
    monkeypatch.setattr(type(model), "posterior", None)
    store = open_latents(tmp_path, model, pictures)
    fill_latents(store, model, pictures, CPU)
    assert torch.equal(
        read_latents(store, model, pictures).batch(range(5)), latents.batch(range(5))
    )


def test_latents_are_of_the_pictures_whatever_is_kept_of_them(model, pictures, latents, tmp_path):
    store = open_latents(tmp_path / "again", model, pictures)
    fill_latents(store, model, pictures.encoded(InMemory(torch.zeros(len(pictures), 2))), CPU)
    assert torch.equal(read_latents(store, model, pictures).batch([0, 2]), latents.batch([0, 2]))


def test_loading_says_nothing(folder, capfd):
    load(folder)
    assert capfd.readouterr() == ("", "")


def test_posteriors_of_mirror_images(model, pictures, tmp_path):
    store = open_latents(tmp_path, model, pictures, flips=True)
    fill_latents(store, model, pictures, CPU)
    posteriors = read_posteriors(store, model, pictures)
    assert posteriors.shape == (5, 2, 2, 4, 8, 8)
    assert relative_error(posteriors[:, 0], model.posterior(pictures.images, CPU)) < 1e-6
    mirrored = model.posterior(pictures.images.flip(-1), CPU)
    assert relative_error(posteriors[:, 1], mirrored) < 1e-6
    assert relative_error(posteriors[:, 1], posteriors[:, 0]) > 1e-2
    with pytest.raises(StoreError, match=r"kind is .* there and .* here"):
        open_latents(tmp_path, model, pictures)


def test_other_images_or_another_vae_are_refused(folder, pictures, tmp_path):
    model = load_tiny(folder)
    open_latents(tmp_path, model, pictures)
    with pytest.raises(StoreError, match=r"data is .* there and .* here"):
        open_latents(tmp_path, model, pictures.select([0, 1]))
    changed = load_tiny(folder)
    with torch.no_grad():
        changed.vae.encoder.conv_in.bias[0] += 1
    with pytest.raises(StoreError, match=r"vae is .* there and .* here"):
        open_latents(tmp_path, changed, pictures)


def test_what_does_not_fit_is_refused(model, pictures, captions, tmp_path):
    store = open_latents(tmp_path / "a", model, pictures)
    with pytest.raises(ValueError, match="conditions must be 5 long, got 4"):
        pictures.conditioned(captions[:4])
    with pytest.raises(StoreError, match="is incomplete"):
        read_latents(store, model, pictures).batch(slice(0, 2))
    odd = Samples(torch.zeros(2, 3, 8, 7), ["a", "b"], None, "odd")
    with pytest.raises(ValueError, match="sides that are multiples of 2, got 7x8 pixels"):
        open_latents(tmp_path / "b", model, odd)


def loop_gradients(model, chosen, latents):
    """One backward per sample and timestep, written out: the oracle of both ways, in float64."""
    from dtrak.features.noise import sample_noise

    unet = model.module.double()
    parameters = [p for name, p in unet.named_parameters() if ".lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_()
    bars = model.process.scheduler.alphas_cumprod.double()
    rows = []
    for index, name in enumerate(latents.ids):
        total = 0
        for t in chosen.timesteps:
            noise = sample_noise([name], [t], (4, 8, 8), seed=5, dtype=torch.float64)[0]
            x = bars[t].sqrt() * latents.batch([index])[0].double() + (1 - bars[t]).sqrt() * noise
            text = model.embed([latents.conditions[index]], CPU).double()
            u = unet(x, torch.tensor([t]), encoder_hidden_states=text).sample
            f = {"mean_squared_l2_norm": (u**2).mean(), "loss": ((u - noise) ** 2).mean()}
            grads = torch.autograd.grad(f[chosen.output_function], parameters)
            total = total + torch.cat([grad.flatten() for grad in grads])
        rows.append(total / len(chosen.timesteps))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "function", ["mean_squared_l2_norm", pytest.param("loss", marks=pytest.mark.full)]
)
def test_fused_features_are_the_adapters_gradients(function, folder, latents):
    chosen = settings(function=function)
    expected = loop_gradients(load_tiny(folder), chosen, latents)
    extractor = FusedExtractor(load_tiny(folder), chosen, CPU)
    assert extractor.sketcher.parameter_names == load_tiny(folder).parameters()
    features = extract_rows(extractor, latents, slice(0, 5))
    # the scheduler's products are float32
    assert relative_error(features, expected) < 1e-6
    # every sample for itself, whatever its batch
    apart = torch.cat([extract_rows(extractor, latents, slice(i, i + 1)) for i in range(5)])
    assert relative_error(apart, features) < 1e-7


@pytest.mark.parametrize("kind", ["sjlt", pytest.param("rademacher", marks=pytest.mark.full)])
def test_fused_features_are_the_published_gradients_projected(kind, folder, latents):
    pytest.importorskip("trak", reason="TRAK is not installed")
    from dtrak.features.published import PublishedExtractor

    chosen = settings(kind)
    fused = FusedExtractor(load_tiny(folder), chosen, CPU)
    published = PublishedExtractor(load_tiny(folder), chosen, CPU)
    assert published.grad_dim == fused.grad_dim
    grads = published.gradients(latents.batch(slice(None)), latents.ids, latents.conditions)
    features = extract_rows(fused, latents, slice(0, 5))
    expected = project(grads, chosen.projection, shapes=fused.sketcher.shapes)
    # fused attention is good to 1e-7 in float64
    assert relative_error(features, expected) < 1e-6


def test_fused_attention_stays_fused(folder, latents):
    from diffusers.models.attention_processor import AttnProcessor2_0

    extractor = FusedExtractor(load_tiny(folder), settings(), CPU)
    extract_rows(extractor, latents, slice(0, 2))
    kinds = {type(processor) for processor in extractor.model.module.attn_processors.values()}
    assert kinds == {AttnProcessor2_0}


def test_the_caption_counts(folder, latents):
    extractor = FusedExtractor(load_tiny(folder), settings(), CPU)
    features = extract_rows(extractor, latents, slice(0, 2))
    other = extractor.extract(latents.batch(slice(0, 2)), latents.ids[:2], ["b c", "b c"])
    assert relative_error(other[1], features[1]) < 1e-9
    assert relative_error(other[0], features[0]) > 1e-4
    for captions, got in ((None, "none"), (["a"], "1")):
        with pytest.raises(ValueError, match=f"captions must be 2, .* got {got}"):
            extractor.extract(latents.batch(slice(0, 2)), latents.ids[:2], captions)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)]
)
def test_dtypes(dtype, tolerance, folder, latents):
    expected = FusedExtractor(load_tiny(folder), settings(), CPU)
    oracle = extract_rows(expected, latents, slice(0, 3))
    extractor = FusedExtractor(load_tiny(folder), settings(dtype=dtype), CPU)
    features = extract_rows(extractor, latents, slice(0, 3))
    assert features.dtype == torch.float32
    assert 0 < relative_error(features, oracle) < tolerance


def test_the_manifest_names_what_changed(folder, model, pictures, captions, latents, tmp_path):
    base = deciding_settings(model, settings(), latents, "fused")

    def differs(model=model, data=latents):
        other = deciding_settings(model, settings(), data, "fused")
        return describe_differences(base, other)

    assert differs() == ""
    assert differs(load_tiny(folder, seed=2)).startswith("lora is")
    store = open_latents(tmp_path, model, pictures)
    fill_latents(store, model, pictures, CPU)
    other = read_latents(store, model, pictures.conditioned([*captions[:4], "other"]))
    assert differs(data=other).startswith("captions is")
    changed = load_tiny(folder)
    with torch.no_grad():
        changed.vae.encoder.conv_in.bias[0] += 1
    assert differs(changed).startswith("encoding.vae is")
    # a VAE's scale and shift decide latents as its weights do
    for name in ("scaling_factor", "shift_factor"):
        changed = load_tiny(folder)
        changed.vae.register_to_config(**{name: 0.25})
        assert differs(changed).startswith(f"encoding.{name} is")


def test_a_store_is_filled_with_captions(folder, latents, tmp_path):
    from dtrak.features.store import FeatureStore

    extractor = FusedExtractor(load_tiny(folder), settings(), CPU)
    store = FeatureStore.open(tmp_path, {}, latents.ids, extractor.proj_dim, 2)
    fill_store(store, extractor, latents, role="train/")
    names = [f"train/{name}" for name in latents.ids]
    expected = extractor.extract(latents.batch(slice(None)), names, latents.conditions)
    assert relative_error(store.load(), expected) < 1e-6


def test_captions_from_the_folder_reach_the_features(tmp_path, model):
    source = write_pictures(tmp_path / "pictures")
    data = load_data(source)
    store = open_latents(tmp_path / "latents", model, data)
    fill_latents(store, model, data, CPU)
    with pytest.warns(UserWarning, match="captions have more than 16 tokens"):
        model.identify_items(load_captions(str(source), data))
    read = read_latents(store, model, data.conditioned(load_captions(str(source), data)))
    assert read.conditions[0] == ""
