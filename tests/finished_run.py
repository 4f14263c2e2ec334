"""A finished run of the main job in miniature, whose model says how it was trained."""

import json

import torch
from rich.console import Console

from dtrak.cli.attribution import run_attribution
from dtrak.data.images import encode_png, load_data, to_uint8
from dtrak.models.unet import digits_model
from dtrak.runs.record import list_queries
from dtrak.runs.run import Options
from dtrak.training.trainer import Recipe, train

RECIPE = Recipe(steps=6, batch_size=16, learning_rate=1e-3, seed=5)
OPTIONS = {
    "model": None, "data": "digits", "queries": "generated", "num_queries": 4,
    "output_function": None, "timesteps": "2", "timestep_strategy": None,
    "noise_seed": 0, "projection": "sjlt", "proj_dim": 256, "seed": 0, "damping": None,
    "top_k": 3, "batch_size": None, "device": "cpu", "dtype": "float32", "output": None,
    "fused": True, "skip_corrupt": False, "resize": False,
}  # fmt: skip


def results(run):
    """Where the scores of the set of queries lie that a run explained last."""
    return max(
        list_queries(run).values(), key=lambda place: (place / "manifest.json").stat().st_mtime_ns
    )


def make_images(folder, count=60):
    """Digits as files, which load as images of 8 x 8."""
    folder.mkdir(parents=True)
    for index, image in enumerate(load_data("digits", limit=count).images):
        (folder / f"{index:03d}.png").write_bytes(encode_png(to_uint8(image)))
    return folder


def make_model(folder, images, recipe=RECIPE, note=True):
    """The digits' model trained for a few steps, with the note that dtrak.train leaves."""
    data = load_data(images, channels=1, size=8)
    model = digits_model(recipe.seed)
    train(model, data, recipe)
    model.save(folder)
    if note:
        settings = {
            "start": {"preset": "digits"},
            "recipe": recipe.to_dict(),
            "data": {"fingerprint": data.fingerprint, "rows": len(data)},
        }
        (folder / "training.json").write_text(json.dumps({"settings": settings}))
    return folder


def make_run(folder, *, note=True, **options):
    """A run in ``folder/run`` on images in ``folder/images`` and a model in ``folder/model``."""
    images = make_images(folder / "images")
    model = make_model(folder / "model", images, note=note)
    places = {"model": str(model), "data": str(images), "output": str(folder / "run")}
    with torch.random.fork_rng(devices=[]):
        run_attribution(Options(**{**OPTIONS, **places, **options}), Console(quiet=True))
    return folder / "run"
