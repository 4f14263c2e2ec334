"""Methods without gradients, against numpy, scikit-learn and transformers themselves."""

import logging

import numpy as np
import pytest
import torch
from numerics import relative_error
from PIL import Image
from sklearn.linear_model import Ridge, RidgeCV

from dtrak.evaluation.lds.statistics import lds
from dtrak.methods.baselines import (
    Clip,
    EncoderError,
    choose_datamodel_dampings,
    clip_embeddings,
    datamodel,
    dino_embeddings,
    empirical_influence,
    load_clip,
    load_dino,
    load_vae,
    random_scores,
    vae_latents,
)


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load_clip(clip_folder)


def models(R=40, N=15, M=6, noise=0.5, seed=0):
    """Losses that a sample's presence lowers by its effect, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    subsets = torch.rand(R, N, generator=generator) < 0.5
    effects = torch.randn(M, N, generator=generator, dtype=torch.float64)
    losses = 3 - subsets.double() @ effects.T
    losses += noise * torch.randn(R, M, generator=generator, dtype=torch.float64)
    return subsets, losses, effects


def images(count, channels=3, size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator) * 2 - 1


def test_random_scores_are_seeded_uniform_and_leave_the_global_state():
    before = torch.random.get_rng_state()
    scores = random_scores(50, 400, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(scores, random_scores(50, 400, seed=3))
    assert not torch.equal(scores, random_scores(50, 400, seed=4))
    assert scores.shape == (50, 400)
    assert 0 <= scores.min() <= scores.max() < 1
    # 20,000 draws: mean and variance within five standard errors
    assert scores.mean().item() == pytest.approx(1 / 2, abs=5 * (1 / 12 / 20000) ** 0.5)
    assert scores.var().item() == pytest.approx(1 / 12, abs=5 * (1 / 180 / 20000) ** 0.5)
    with pytest.raises(ValueError, match="M and N must be at least 0, got -1 and 2"):
        random_scores(-1, 2, 0)


def test_empirical_influence_is_a_difference_of_means():
    subsets, losses, _ = models()
    expected = np.array(
        [
            [
                np.mean([losses[r, m] for r in range(40) if not subsets[r, i]])
                - np.mean([losses[r, m] for r in range(40) if subsets[r, i]])
                for i in range(15)
            ]
            for m in range(6)
        ]
    )
    assert empirical_influence(subsets, losses).numpy() == pytest.approx(expected, rel=1e-12)


def test_a_sample_seen_by_all_models_or_none_scores_zero():
    subsets, losses, _ = models()
    subsets[:, 3], subsets[:, 5] = True, False
    scores = empirical_influence(subsets, losses)
    assert (scores[:, [3, 5]] == 0).all()
    assert (scores[:, [0, 1, 2, 4]] != 0).all()


@pytest.mark.parametrize("R", [40, 43])
@pytest.mark.parametrize("dampings", [(0.1, 1.0, 10.0), (10.0, 0.1, 1.0), (2.0,)])
def test_datamodel_is_scikit_learns_query_by_query(R, dampings):
    subsets, losses, _ = models(R=R, noise=0.1)
    # queries differ in which damping suits them
    strength = torch.tensor([0, 0.5, 1, 2, 4, 8]).double()
    losses += strength * torch.randn(R, 6, generator=torch.Generator().manual_seed(5)).double()
    x = subsets.numpy().astype(np.float64)
    oracle = [RidgeCV(alphas=list(dampings), cv=5).fit(x, losses[:, m].numpy()) for m in range(6)]
    chosen = choose_datamodel_dampings(subsets, losses, dampings)
    assert chosen.tolist() == [fit.alpha_ for fit in oracle]
    assert len(dampings) == 1 or len(set(chosen.tolist())) > 1
    expected = -torch.tensor(np.array([fit.coef_ for fit in oracle]))
    assert relative_error(datamodel(subsets, losses, dampings), expected) < 1e-10


def test_datamodel_with_more_samples_than_models_and_other_folds():
    subsets, losses, _ = models(R=24, N=90)
    x = subsets.numpy().astype(np.float64)
    chosen = choose_datamodel_dampings(subsets, losses, (0.5, 50.0), folds=3)
    for m in range(6):
        fit = RidgeCV(alphas=[0.5, 50.0], cv=3).fit(x, losses[:, m].numpy())
        assert chosen[m] == fit.alpha_
        again = Ridge(alpha=fit.alpha_).fit(x, losses[:, m].numpy())
        scores = datamodel(subsets, losses, (0.5, 50.0), folds=3)[m]
        assert relative_error(scores, -torch.tensor(again.coef_)) < 1e-10


def test_datamodel_of_a_query_whose_loss_never_changes_is_zero():
    subsets, losses, _ = models()
    losses[:, 2] = 0.7
    scores = datamodel(subsets, losses)
    assert scores[2].abs().max() < 1e-12
    assert scores[1].abs().max() > 1e-3


def test_positive_scores_are_proponents():
    """Both estimates recover which samples lower the loss, and predict held-out models."""
    subsets, losses, effects = models(R=400, noise=0.1)
    for scores in (empirical_influence(subsets, losses), datamodel(subsets, losses)):
        assert np.corrcoef(scores.flatten(), effects.flatten())[0, 1] > 0.9
        fresh = models(R=400, noise=0.1)[0].roll(1, dims=1)
        assert lds(scores, fresh, 3 - fresh.double() @ effects.T) > 0.8


@pytest.mark.parametrize("method", [empirical_influence, datamodel])
def test_retraining_methods_refuse(method):
    subsets, losses, _ = models()
    with pytest.raises(TypeError, match=r"subsets must be bool, got torch\.float64"):
        method(subsets.double(), losses)
    with pytest.raises(ValueError, match=r"losses \[R, M\], got \[40, 15\] and \[39, 6\]"):
        method(subsets, losses[:-1])
    with pytest.raises(ValueError, match=r"losses must be finite, got row 7 that is not"):
        method(subsets, losses.index_fill(0, torch.tensor(7), float("inf")))
    with pytest.raises(ValueError, match=r"subsets must be of at least 10? models, got 0"):
        method(subsets[:0], losses[:0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"folds": 21}, "subsets must be of at least 42 models, got 40"),
        ({"dampings": ()}, r"dampings must be positive, finite and at least one, got \[\]"),
        ({"dampings": (1.0, 0.0)}, r"dampings must be positive.* got \[1\.0, 0\.0\]"),
        ({"dampings": (float("nan"),)}, r"dampings must be positive.* got \[nan\]"),
    ],
)
def test_datamodel_refuses(options, message):
    subsets, losses, _ = models()
    with pytest.raises(ValueError, match=message):
        datamodel(subsets, losses, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_embeddings_are_those_of_transformers(clip_folder, clip, channels):
    """The class transformers has for this, on one image at a time as Pillow holds it."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    batch = images(5, channels)
    done = []
    found = clip_embeddings(batch, clip, batch_size=2, progress=lambda *p: done.append(p))
    assert done == [(2, 5), (4, 5), (5, 5)]
    encoder = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    for image, embedding in zip(batch, found, strict=True):
        levels = ((image.double() + 1) / 2 * 255).round().numpy().astype(np.uint8)
        pixels = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        inputs = processor(images=picture, return_tensors="pt")
        with torch.no_grad():
            expected = encoder(**inputs).image_embeds[0]
        assert relative_error(embedding, expected) < 1e-5
    assert relative_error(found[1], found[0]) > 1e-3


def test_an_encoder_embeds_by_its_first_token(dino_folder, capfd):
    """Of weights without a pooler, as DINO's are, against the class that has none."""
    from transformers import ViTImageProcessor, ViTModel

    model = load_dino(dino_folder)
    captured = capfd.readouterr()
    assert captured.err + captured.out == ""
    batch = images(5, 1)
    found = dino_embeddings(batch, model, batch_size=2)
    encoder = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    processor = ViTImageProcessor.from_pretrained(dino_folder)
    for image, embedding in zip(batch, found, strict=True):
        levels = ((image.double() + 1) / 2 * 255).round().numpy().astype(np.uint8)
        pixels = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
        inputs = processor(
            images=Image.fromarray(np.ascontiguousarray(pixels)), return_tensors="pt"
        )
        with torch.no_grad():
            expected = encoder(**inputs).last_hidden_state[0, 0]
        assert relative_error(embedding, expected) < 1e-5
    assert relative_error(found[1], found[0]) > 1e-3


def test_a_convolutional_encoder_embeds_by_the_mean_of_its_positions(tmp_path):
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model = load_dino(tmp_path)
    found = dino_embeddings(images(2, 3), model)
    assert found.shape == (2, 16)
    inputs = ((images(2, 3).double() + 1) / 2 * 255).round().to(torch.uint8).movedim(1, -1)
    given = model.processor(images=list(inputs.numpy()), return_tensors="pt")
    with torch.no_grad():
        # what its own pooler is
        pooled = model.model(**given).pooler_output.flatten(1)
    assert relative_error(found, pooled) < 1e-5


def test_what_takes_no_images_is_no_encoder(clip_folder, dino_folder, tmp_path):
    from transformers import BertConfig, BertModel

    small = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(small).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=r"DINO must be a folder with preprocessor_config\.json"):
        load_dino(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(
        (dino_folder / "preprocessor_config.json").read_bytes()
    )
    with pytest.raises(EncoderError, match="it must take pixel_values, got input_ids"):
        load_dino(tmp_path)
    with pytest.raises(FileNotFoundError, match="DINO must be an existing folder of a transform"):
        load_dino(tmp_path / "absent")


def test_embeddings_of_no_image(clip):
    assert clip_embeddings(torch.zeros(0, 3, 8, 8), clip).shape == (0, 24)


def test_embeddings_refuse(clip):
    with pytest.raises(ValueError, match=r"images must be \[N, 1 or 3, H, W\], got \[2, 4, 8, 8\]"):
        clip_embeddings(torch.zeros(2, 4, 8, 8), clip)
    with pytest.raises(ValueError, match="images must be finite"):
        clip_embeddings(torch.full((1, 3, 8, 8), float("nan")), clip)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        clip_embeddings(torch.zeros(1, 3, 8, 8), clip, batch_size=0)


def test_clip_is_loaded_quietly_and_leaves_the_log_level(clip_folder, capfd):
    level = logging.getLogger("transformers").level
    assert isinstance(load_clip(clip_folder), Clip)
    assert logging.getLogger("transformers").level == level
    captured = capfd.readouterr()
    assert captured.err + captured.out == ""


def test_clip_refuses(clip_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="CLIP must be an existing folder"):
        load_clip(tmp_path / "absent")
    for name in ("config.json", "preprocessor_config.json"):
        folder = tmp_path / f"without {name}"
        folder.mkdir()
        for file in clip_folder.iterdir():
            if file.name != name:
                (folder / file.name).write_bytes(file.read_bytes())
        with pytest.raises(EncoderError, match=f"CLIP must be a folder with {name}, got"):
            load_clip(folder)


def test_clip_with_damaged_or_missing_weights(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["visual_projection.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"got none for visual_projection\.weight"):
        load_clip(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EncoderError, match="could not be loaded"):
        load_clip(tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_are_the_mode_of_the_posterior(vae_folder, channels):
    vae = load_vae(vae_folder)
    batch = images(5, channels, size=12)
    found = vae_latents(batch, vae, batch_size=2)
    assert found.shape == (5, 2, 6, 6)
    for image, latent in zip(batch, found, strict=True):
        with torch.no_grad():
            hidden = vae.encoder(image.repeat(3 // channels, 1, 1)[None])
            moments = vae.quant_conv(hidden)[0]
        # the first half are the means
        assert relative_error(latent, moments[:2]) < 1e-5
    assert relative_error(found[0], found[1]) > 1e-3


def test_latents_do_not_depend_on_the_memory_layout(vae_folder):
    vae = load_vae(vae_folder)
    batch = images(4, 3, size=16)
    read_from_files = batch.contiguous(memory_format=torch.channels_last)
    assert torch.equal(vae_latents(batch, vae), vae_latents(read_from_files, vae))


def test_vae_refuses(vae_folder, tmp_path):
    vae = load_vae(vae_folder / "vae")
    with pytest.raises(ValueError, match=r"images must be \[N, 1 or 3, H, W\], got \[1, 2, 8, 8"):
        vae_latents(torch.zeros(1, 2, 8, 8), vae)
    with pytest.raises(ValueError, match=r"multiples of 2 for this VAE, got \[8, 7\]"):
        vae_latents(torch.zeros(1, 3, 8, 7), vae)
    with pytest.raises(ValueError, match="images must be finite, got row 1"):
        vae_latents(torch.tensor([0.0, float("nan")])[:, None, None, None].expand(2, 3, 8, 8), vae)
    with pytest.raises(FileNotFoundError, match="VAE must be an existing folder"):
        load_vae(tmp_path / "absent")
    with pytest.raises(EncoderError, match=r"VAE must be a folder with config\.json, got"):
        load_vae(tmp_path)


def test_vae_with_missing_or_damaged_weights(vae_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in (vae_folder / "vae").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["quant_conv.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"got none for quant_conv\.weight"):
        load_vae(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EncoderError, match="could not be loaded"):
        load_vae(tmp_path)
