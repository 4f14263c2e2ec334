"""CLIP similarity of an experiment's images, against transformers' own encoder."""

import shutil

import numpy as np
import pytest
import torch
from numerics import relative_error
from test_lds_methods import groups, quiet
from tiny_lds import CPU, PRESET, register

from dtrak.data.images import load_data
from dtrak.evaluation.lds import clip as lds_clip
from dtrak.evaluation.lds.clip import ClipEncoder
from dtrak.evaluation.lds.experiment import prepare
from dtrak.evaluation.lds.methods import CLIP_METHODS, METHODS, Predictor, Setting, list_settings


def reference(folder, images):
    """Embeddings in float64, one image at a time."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    processor = CLIPImageProcessor.from_pretrained(folder)
    rows = []
    for image in images:
        levels = ((image.double() + 1) / 2 * 255).round().numpy().astype(np.uint8)
        pixels = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
        with torch.no_grad():
            inputs = processor(
                images=pixels, return_tensors="pt", input_data_format="channels_last"
            )
            rows.append(encoder(**inputs).image_embeds[0].double())
    return torch.stack(rows)


def test_rows_are_dot_and_cosine_of_the_embeddings(tmp_path, clip_folder):
    register()
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=4)
    queries = {"validation": experiment.validation}
    settings = [Setting(method) for method in CLIP_METHODS]
    with pytest.raises(ValueError, match="clip must be given"):
        list(Predictor(experiment, queries, CPU, quiet).predict(settings))
    predictor = Predictor(experiment, queries, CPU, quiet, ClipEncoder(clip_folder))
    dot, cosine = predictor.predict(settings)
    ours = reference(clip_folder, experiment.validation.images)
    theirs = reference(clip_folder, experiment.data.images)
    products = ours @ theirs.T
    assert relative_error(dot.values[0], groups(experiment, products)) < 1e-5
    cosines = products / ours.norm(dim=1)[:, None] / theirs.norm(dim=1)
    assert relative_error(cosine.values[0], groups(experiment, cosines)) < 1e-5
    assert (dot.kinds, dot.rules) == (("validation",), ("",))


def test_rows_follow_the_clip_model(tmp_path, clip_folder):
    register()
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=4)
    queries = {"validation": experiment.validation}
    other = tmp_path / "clip"
    shutil.copytree(clip_folder, other)
    file = other / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    found = []
    for folder in (clip_folder, other):
        predictor = Predictor(experiment, queries, CPU, quiet, ClipEncoder(folder))
        (prediction,) = predictor.predict([Setting(CLIP_METHODS[0])])
        scores = (
            reference(folder, experiment.validation.images)
            @ reference(folder, experiment.data.images).T
        )
        assert relative_error(prediction.values[0], groups(experiment, scores)) < 1e-5
        found.append(prediction.values)
    assert relative_error(found[0], found[1]) > 1e-3


def test_embeddings_are_computed_once(tmp_path, clip_folder, monkeypatch):
    data, encoder = load_data("digits", limit=5), ClipEncoder(clip_folder)
    file = tmp_path / "clip" / "train.safetensors"
    seen = []
    first = encoder.embed(file, data, lambda *p: seen.append(p))
    assert seen == [(5, 5)]
    assert relative_error(first, reference(clip_folder, data.images)) < 1e-5
    with monkeypatch.context() as patched:
        patched.setattr(lds_clip, "clip_embeddings", lambda *_, **__: pytest.fail("again"))
        assert torch.equal(ClipEncoder(clip_folder).embed(file, data), first)
    # of other images, or damaged: anew
    assert len(encoder.embed(file, data.select(range(3)))) == 3
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(encoder.embed(file, data), first)


def test_only_where_there_is_a_model(tmp_path):
    names = [setting.method.title for setting in list_settings([10], ["sjlt"])]
    assert not [name for name in names if "CLIP" in name]
    with_clip = [s.method.title for s in list_settings([10], ["sjlt"], (*METHODS, *CLIP_METHODS))]
    assert set(with_clip) - set(names) == {"CLIP, dot", "CLIP, cosine"}
    with pytest.raises(FileNotFoundError, match="CLIP must be an existing folder"):
        ClipEncoder(tmp_path / "absent")
