"""How a model is trained again: what its trainer wrote down, followed to the bit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from finished_run import OPTIONS, RECIPE, results
from rich.console import Console
from tiny_lds import quiet
from tiny_stable_diffusion import build_pipeline, write_pictures
from typer.testing import CliRunner

from dtrak.cli.attribution import run_attribution
from dtrak.cli.counterfactual import app
from dtrak.data.images import load_data, to_uint8
from dtrak.evaluation.counterfactual.origin import open_origin
from dtrak.evaluation.counterfactual.results import load_counterfactual
from dtrak.evaluation.retraining import RetrainingError
from dtrak.methods.baselines import vae_latents
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.models.lora import hash_lora
from dtrak.models.unet import digits_model
from dtrak.runs.run import Options
from dtrak.training.command import run_training
from dtrak.training.options import Options as TrainOptions
from dtrak.training.presets import PRESETS
from dtrak.training.record import RecordError
from dtrak.training.trainer import Recipe, train

pytestmark = pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")
CPU, QUIET = torch.device("cpu"), Console(quiet=True)


@pytest.fixture
def changed(finished, tmp_path):
    """A copy of the run, its model and its images, one of which a test changes."""

    def change(**options):
        shutil.copytree(finished.parent, tmp_path / "copy")
        file = results(tmp_path / "copy" / "run") / "manifest.json"
        manifest = json.loads(file.read_text())
        places = {"model": tmp_path / "copy" / "model", "data": tmp_path / "copy" / "images"}
        manifest["options"] |= {name: str(place) for name, place in places.items()} | options
        file.write_text(json.dumps(manifest))
        return tmp_path / "copy" / "run"

    return change


@pytest.fixture
def opened(tmp_path):
    """Open a run for an experiment in a folder of its own."""
    return lambda folder, **options: open_origin(folder, tmp_path / "experiment", **options)


def retrained(origin, kept, seed):
    """A model trained on the images ``kept``."""
    made = []
    origin.retraining.train_once(
        f"a{int(kept.sum())}", kept, (seed, seed), CPU, is_done=lambda: False, finish=made.append
    )
    return made[0]


def test_a_model_nobody_says_how_to_train(changed, opened):
    run = changed()
    (run.parent / "model" / "training.json").unlink()
    message = r"--recipe \(or --preset\) must say how .* no training\.json lies"
    with pytest.raises(RetrainingError, match=message):
        opened(run)
    assert opened(run, preset="digits").retraining.recipe == PRESETS["digits"].recipe
    with pytest.raises(ValueError, match=r"preset must be one of .* did you mean 'digits'"):
        opened(run, preset="digit")
    with pytest.raises(RetrainingError, match="got one for a model of other weights or noise"):
        opened(run, preset="cifar2")


def test_a_recipe_written_by_hand(changed, opened, tmp_path):
    """It needs to say no more than what cannot be read off the model and the run."""
    run = changed()
    (run.parent / "model" / "training.json").unlink()
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"recipe": {"steps": 5, "learning_rate": 1e-3, "batch_size": 9}}))
    origin = opened(run, recipe=str(file))
    recipe = Recipe(steps=5, learning_rate=1e-3, batch_size=9)
    assert origin.retraining.recipe == recipe
    kept = torch.arange(60) % 2 == 0
    model = retrained(origin, kept, 3)
    # a network of the same kind, freshly initialised
    own = load(run.parent / "model").fresh(3)
    expected = train(own, origin.data.images[kept], replace(recipe, seed=3))
    assert hash_model(model.module) == hash_model(expected.module)
    for content, message in (
        ("{", "must be a recipe in JSON"),
        ("{}", "no 'recipe' in it: docs/training.md says"),
        ('{"recipe": {"step": 5}}', "did you mean 'steps'"),
        ('{"recipe": {"steps": 0}}', "steps of a recipe must be at least 1, got 0"),
        ('{"recipe": {"steps": "many"}}', "must hold numbers"),
        ('{"recipe": {}, "mixed_precision": "fp15"}', "did you mean 'fp16'"),
        ('{"recipe": {}, "start": {"weight": 3}}', "unexpected keyword argument 'weight'"),
    ):
        file.write_text(content)
        with pytest.raises(RecordError, match=message):
            opened(run, recipe=str(file))
    with pytest.raises(FileNotFoundError, match="no record of a training at"):
        opened(run, recipe=str(tmp_path / "nothing.json"))


def test_a_model_trained_on_other_images(changed, opened):
    run = changed()
    file = run.parent / "model" / "training.json"
    note = json.loads(file.read_text())
    note["settings"]["data"]["fingerprint"] = "0" * 64
    file.write_text(json.dumps(note))
    with pytest.raises(RetrainingError, match="got one trained on 60 others"):
        opened(run)


def test_damaged_notes(changed, opened):
    run = changed()
    file = run.parent / "model" / "training.json"
    note = json.loads(file.read_text())
    settings = note["settings"]
    other = {**settings, "recipe": {**settings["recipe"], "of another version": 1}}
    without = {name: value for name, value in settings.items() if name != "recipe"}
    for damaged in ({}, {"settings": other}, {"settings": without}, []):
        file.write_text(json.dumps(damaged))
        with pytest.raises(RecordError, match=r"training\.json must be a recipe of a training"):
            opened(run)


@pytest.fixture
def fresh_accelerator():
    # it remembers the precision of the first run of a process
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_is_followed(finished, opened, fresh_accelerator):
    origin = opened(finished)
    kept = torch.ones(60, dtype=torch.bool)
    full, before = retrained(origin, kept, 5), origin.identity()
    assert hash_model(full.module) == hash_model(origin.load_model().module)
    training = origin.retraining.training
    origin.retraining.training = replace(training, mixed_precision="bf16")
    found = retrained(origin, kept, 5)
    from accelerate import Accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    expected = digits_model(5)
    train(
        expected, origin.data.images, RECIPE,
        accelerator=Accelerator(mixed_precision="bf16", cpu=True),
    )  # fmt: skip
    assert hash_model(found.module) == hash_model(expected.module)
    assert hash_model(found.module) != hash_model(full.module)
    assert origin.identity()["training"] != before["training"]


def fine_tune(folder, output, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    run_training(
        TrainOptions(
            output=str(output), model=str(folder / "base"), data=str(folder / "pictures"),
            lora_rank=2, steps=4, batch_size=3, learning_rate=0.05, device="cpu", **options,
        ),
        QUIET,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """A text-to-image run: a LoRA fine-tuned by dtrak.train, and its attribution."""
    folder = tmp_path_factory.mktemp("painted")
    base, pictures = build_pipeline(folder / "base"), write_pictures(folder / "pictures")
    fine_tune(folder, folder / "lora")
    options = {
        **OPTIONS, "model": str(base), "lora": str(folder / "lora"), "data": str(pictures),
        "prompts": "a ukiyo e painting", "guidance_scale": 2.0, "num_queries": 3,
        "output": str(folder / "run"), "damping": "0.5",
    }  # fmt: skip
    run_attribution(Options(**options), QUIET)
    return folder


# slow: trainings; test_lds_text_to_image.py has subsets of one in the fast lane
@pytest.mark.full
def test_a_lora_is_trained_again_as_it_was(painted, opened, tmp_path):
    origin = opened(painted / "run")
    retraining = origin.retraining
    assert (retraining.training.start.rank, retraining.drawing.guidance_scale) == (2, 2.0)
    assert origin.items["00001.png"] == "a ukiyo e painting"
    retraining.prepare(CPU, quiet)
    kept = torch.ones(5, dtype=torch.bool)
    model = retrained(origin, kept, retraining.recipe.seed)
    own = load(painted / "base", painted / "lora")
    assert hash_lora(model.module) == hash_lora(own.module)
    drawn = load_data(next((painted / "run").glob("generated-*")))
    again = origin.draw(model, ["00002.png", "00000.png"], CPU)
    # drawn in batches of another size
    difference = again.int() - to_uint8(drawn.images[[2, 0]]).int()
    assert difference.abs().max() <= 1
    assert again.float().std() > 1

    # without some images it is the model that dtrak.train trains without them
    kept[[1, 3]] = False
    fewer = retrained(origin, kept, retraining.recipe.seed)
    names = [
        name for name, is_kept in zip(origin.data.ids, kept.tolist(), strict=True) if not is_kept
    ]
    (tmp_path / "without.txt").write_text("\n".join(names))
    fine_tune(painted, tmp_path / "lora", without=str(tmp_path / "without.txt"))
    by_hand = load(painted / "base", tmp_path / "lora")
    assert hash_lora(fewer.module) == hash_lora(by_hand.module)
    assert hash_lora(fewer.module) != hash_lora(own.module)


# slow: retrainings and pictures; a LoRA is trained again in the fast lane
@pytest.mark.full
def test_counterfactual_of_a_lora(painted, tmp_path):
    arguments = [painted / "run", "--num-queries", "2", "--top-k", "2", "--methods",
                 "d-trak,trak,random", "--output", tmp_path / "cf"]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    results = load_counterfactual(tmp_path / "cf")
    assert set(results.values) == {"loss", "pixel_l2", "latent_l2"}
    assert results.pictures["trak"].shape == (2, 1, 3, 16, 16)
    vae = load(painted / "base").vae
    before = vae_latents(results.originals.float() / 127.5 - 1, vae)
    after = vae_latents(results.pictures["trak"][:, 0].float() / 127.5 - 1, vae)
    expected = (after - before).double().flatten(1).norm(dim=1)
    assert results.values["latent_l2"]["trak"][:, 0].tolist() == pytest.approx(expected.tolist())
    assert results.values["pixel_l2"]["random"].min() > 0


def edit(painted, tmp_path, **changes):
    shutil.copytree(painted / "lora", tmp_path / "lora")
    shutil.copytree(painted / "run", tmp_path / "run")
    file = tmp_path / "lora" / "training.json"
    note = json.loads(file.read_text())
    note["settings"] |= changes
    file.write_text(json.dumps(note))
    file = results(tmp_path / "run") / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["options"]["lora"] = str(tmp_path / "lora")
    file.write_text(json.dumps(manifest))
    return tmp_path / "run"


# slow: needs a run of a LoRA; of pixels the same refusals are in the fast lane
@pytest.mark.full
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start": {"rank": 3}}, "got one for a model of other weights or noise"),
        ({"data": {"fingerprint": "0", "rows": 5}}, "got one trained on 5 others"),
    ],
)
def test_loras_of_something_else(painted, opened, tmp_path, changes, message):
    with pytest.raises(RetrainingError, match=message):
        opened(edit(painted, tmp_path, **changes))


# slow: needs a run of a LoRA; of pixels it is in the fast lane
@pytest.mark.full
def test_loras_nobody_says_how_to_train(painted, opened, tmp_path):
    run = edit(painted, tmp_path)
    (tmp_path / "lora" / "training.json").unlink()
    with pytest.raises(RetrainingError, match=r"must say how .* no training\.json"):
        opened(run)
    for preset in ("cifar2", "artbench2"):
        with pytest.raises(RetrainingError, match="got one for a model of other weights or noise"):
            opened(run, preset=preset)
    # rank and layers are read off the LoRA itself
    (tmp_path / "recipe.json").write_text('{"recipe": {"steps": 2}}')
    start = opened(run, recipe=str(tmp_path / "recipe.json")).retraining.training.start
    assert (start.rank, start.model, len(start.targets)) == (2, str(painted / "base"), 32)


# slow: needs a run of a LoRA
@pytest.mark.full
def test_experiments_on_different_runs_differ(finished, painted, opened):
    assert opened(finished).identity() != opened(painted / "run").identity()
