"""What an experiment asks of a kind of model, asked of the unconditional one."""

import os
import shutil

import pytest
import torch
from tiny import tiny_model
from tiny_lds import CPU, PRESET

from dtrak.data.samples import join
from dtrak.evaluation.lds.tasks import (
    ExperimentError,
    PixelTask,
    check_painter,
    is_saved,
    record_painter,
    sample_weights,
)
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.training.trainer import train


def make_task():
    return PixelTask(PRESET, PRESET.load_data("train"))


def test_a_pixel_model_is_trained_on_the_chosen_images_as_they_are(tmp_path):
    task, chosen = make_task(), torch.arange(40) % 3 == 0
    model = task.fresh_model(5, CPU)
    seen = []
    task.train(
        model,
        chosen,
        PRESET.recipe,
        checkpoint=tmp_path / "training.pt",
        checkpoint_every=3,
        progress=lambda *p: seen.append(p),
    )
    assert seen == [(step, 8) for step in range(1, 9)]
    expected = train(tiny_model(5), task.data.images[chosen], PRESET.recipe)
    assert hash_model(model.module) == hash_model(expected.module)
    # a folder that Diffusers reads, and no other file
    folder = tmp_path / "model"
    assert not is_saved(folder)
    task.save(model, folder, chosen, PRESET.recipe)
    assert is_saved(folder)
    assert {path.name for path in folder.iterdir()} == {"model_index.json", "unet", "scheduler"}
    assert hash_model(load(folder).module) == hash_model(model.module)
    assert task.samples("train", task.data, CPU) is task.data
    assert (task.deciding(), task.prompts([0, 1]), task.dtype(CPU)) == ({}, None, "float32")


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


def test_pixel_journeys_pass_through_the_pictures_drawn():
    task, model = make_task(), tiny_model(2)
    (expected,) = model.draw([4, 1], num_inference_steps=3, trajectories=True)
    (journey,) = task.journeys(model, [4, 1], CPU)
    assert (journey.seeds, journey.captions) == ([4, 1], None)
    assert torch.equal(journey.predicted, expected.trajectories)
    # ceil(1000 / 3) apart
    assert task.journey_timesteps(model) == [666, 333, 0]
    ((seeds, images),) = task.draw(model, [4, 1], CPU)
    assert seeds == [4, 1]
    assert torch.equal(images, expected.images)


def test_queries_of_several_kinds_are_joined_in_order():
    task = make_task()
    validation, train_set = PRESET.load_data("validation"), task.data
    joined = join([validation, train_set], "queries")
    assert joined.ids == validation.ids + train_set.ids
    assert torch.equal(joined.images[: len(validation)], validation.images)
