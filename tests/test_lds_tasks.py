"""What an experiment asks of a kind of model, asked of the unconditional one."""

import torch
from tiny import tiny_model
from tiny_lds import CPU, PRESET

from dtrak.diffusion import hash_model, load_model
from dtrak.generation import draw_batches
from dtrak.lds_tasks import PixelTask, is_saved
from dtrak.training import train


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
    assert hash_model(model.unet) == hash_model(expected.unet)
    # a folder that Diffusers reads, and no other file
    folder = tmp_path / "model"
    assert not is_saved(folder)
    task.save(model, folder, chosen, PRESET.recipe)
    assert is_saved(folder)
    assert {path.name for path in folder.iterdir()} == {"model_index.json", "unet", "scheduler"}
    assert hash_model(load_model(folder).unet) == hash_model(model.unet)
    assert task.samples("train", task.data, CPU) is task.data
    assert (task.deciding(), task.prompts([0, 1]), task.dtype(CPU)) == ({}, None, "float32")


def test_pixel_journeys_pass_through_the_pictures_drawn():
    task, model = make_task(), tiny_model(2)
    (expected,) = draw_batches(model, [4, 1], num_inference_steps=3, trajectories=True)
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
    joined = task.join({"validation": validation, "generated": train_set})
    assert joined.ids == validation.ids + train_set.ids
    assert torch.equal(joined.images[: len(validation)], validation.images)
