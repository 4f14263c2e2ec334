"""Models trained again on part of the data, asked of the plainest kind."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from tiny_lds import CPU, PRESET, register

from dtrak.data.samples import join
from dtrak.evaluation.lds.options import ExperimentError
from dtrak.evaluation.lds.queries import check_painter, record_painter
from dtrak.evaluation.retraining import Retraining, RetrainingError, sample_weights
from dtrak.evaluation.subject import subject_of_preset
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.runs.files import claim
from dtrak.training.command import is_saved
from dtrak.training.record import read_training
from dtrak.training.trainer import train


def make_retraining(folder):
    register()
    subject = subject_of_preset(PRESET)
    return Retraining(subject.training, folder, subject.drawing)


def test_a_model_is_trained_on_the_chosen_images_as_they_are(tmp_path):
    retraining, chosen = make_retraining(tmp_path), torch.arange(40) % 3 == 0
    seen, made, folder = [], [], tmp_path / "model"

    def finish(model):
        made.append(model)
        retraining.save(model, folder, chosen, 5)

    def again(**options):
        return retraining.train_once(
            "a", chosen, (5, 5), CPU, is_done=lambda: is_saved(folder), finish=finish, **options
        )

    with claim(tmp_path / "locks" / "a.lock"):
        assert not again()
    assert again(progress=lambda *p: seen.append(p))
    assert not again(), "it is finished"
    assert seen == [(step, 8) for step in range(1, 9)]
    recipe = replace(PRESET.recipe, seed=5)
    expected = train(tiny_model(5), retraining.data.images[chosen], recipe)
    assert hash_model(made[0].module) == hash_model(expected.module)
    # a folder that Diffusers reads, with the record from which it can be trained again
    assert {path.name for path in folder.iterdir()} == {
        "model_index.json", "unet", "scheduler", "training.json"
    }  # fmt: skip
    assert hash_model(load(folder).module) == hash_model(expected.module)
    record = read_training(folder / "training.json")
    assert (record.recipe, record.rows) == (recipe, int(chosen.sum()))
    assert record.fingerprint == retraining.data.select(chosen).fingerprint
    assert retraining.samples("train", retraining.data, CPU) is retraining.data
    assert retraining.dtype(CPU) == "float32"
    assert not list((tmp_path / "training").iterdir())


def test_weights_and_order_have_seeds_of_their_own(tmp_path):
    retraining, made = make_retraining(tmp_path), []
    assert retraining.train_once(
        "a", None, (3, 4), CPU, is_done=lambda: False, finish=made.append
    )  # fmt: skip
    expected = train(tiny_model(3), retraining.data.images, replace(PRESET.recipe, seed=4))
    assert hash_model(made[0].module) == hash_model(expected.module)


def test_other_images_than_the_model_was_trained_on_are_refused(tmp_path):
    retraining = make_retraining(tmp_path)
    for fingerprint in (None, retraining.data.fingerprint):
        retraining.training = replace(retraining.training, fingerprint=fingerprint)
        retraining.check_data(retraining.data)
    retraining.training = replace(retraining.training, fingerprint="0" * 64, rows=1234)
    with pytest.raises(RetrainingError, match=r"images .* of digits, got one trained on 1,234 oth"):
        retraining.check_data(retraining.data)


def test_a_sample_of_weights_tells_models_apart_and_copies_not(tmp_path):
    first, other, copy = (tmp_path / name for name in ("first", "other", "copy"))
    tiny_model(1).save(first)
    tiny_model(2).save(other)
    shutil.copytree(first, copy)
    os.utime(next(copy.rglob("*.safetensors")), (0, 0))
    assert sample_weights(copy) == sample_weights(first) != sample_weights(other)
    (copy / "training.json").write_text("{}")
    assert sample_weights(copy) == sample_weights(first), "only weights count"


def test_pictures_say_which_model_drew_them(tmp_path):
    drawn = tmp_path / "generated"
    drawn.mkdir()
    # nothing is said, as in older runs
    check_painter(tmp_path, "abc")
    record_painter(tmp_path, "abc")
    for weights in ("abc", None):
        check_painter(tmp_path, weights)
    with pytest.raises(ExperimentError, match=r"drew than the one in \S+: delete \S+generated to"):
        check_painter(tmp_path, "abd")
    # what was made of the pictures goes with them
    for name in ("latents/train", "latents/generated", "features"):
        (tmp_path / name).mkdir(parents=True)
    message = r"delete \S+/generated and \S+/latents/generated and \S+/features to draw"
    with pytest.raises(ExperimentError, match=message):
        check_painter(tmp_path, "abd")
    for content in ("{", "[]", "{}"):
        (drawn / "drawn_by.json").write_text(content)
        with pytest.raises(ExperimentError, match=r"drawn_by.json is damaged: delete it"):
            check_painter(tmp_path, "abc")


def test_a_sample_of_a_large_file_is_spread_over_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    content = bytearray(torch.randint(256, (5_000_001,), generator=generator).byte().numpy())
    file, seen = tmp_path / "model.safetensors", set()
    # whole blocks of a training that differ, wherever they lie; the ends to the byte
    for change in (
        (0, 0),
        (0, 1),
        (5_000_000, 5_000_001),
        *((n, n + 10**6) for n in range(0, 5 * 10**6, 10**6)),
    ):
        changed = bytearray(content)
        for place in range(*change):
            changed[place] ^= 1
        file.write_bytes(changed)
        seen.add(sample_weights(tmp_path))
    file.write_bytes(content + b"0")
    seen.add(sample_weights(tmp_path))
    file.rename(tmp_path / "other.bin")
    seen.add(sample_weights(tmp_path))
    assert len(seen) == 10


def test_pictures_are_drawn_as_the_model_draws_them(tmp_path):
    retraining, model = make_retraining(tmp_path), tiny_model(2)
    (expected,) = model.draw([4, 1], num_inference_steps=3, trajectories=True)
    (drawn,) = retraining.draw(model, [4, 1], None, CPU, trajectories=True)
    assert drawn.seeds == [4, 1]
    assert torch.equal(drawn.trajectories, expected.trajectories)
    assert torch.equal(drawn.images, expected.images)


def test_queries_of_several_kinds_are_joined_in_order():
    validation, train_set = PRESET.load_data("validation"), PRESET.load_data("train")
    joined = join([validation, train_set], "queries")
    assert joined.ids == validation.ids + train_set.ids
    assert torch.equal(joined.images[: len(validation)], validation.images)
