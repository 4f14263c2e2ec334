"""How a model is trained again: what its trainer wrote down, followed to the bit."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from finished_run import OPTIONS, RECIPE, results
from rich.console import Console
from tiny_stable_diffusion import build_pipeline, write_pictures
from typer.testing import CliRunner

from dtrak.cli.attribution import run_attribution
from dtrak.cli.counterfactual import app
from dtrak.cli.train import app as train_app
from dtrak.data.images import load_data, to_uint8
from dtrak.evaluation.counterfactual.origin import open_origin
from dtrak.evaluation.counterfactual.results import CounterfactualError, load_counterfactual
from dtrak.evaluation.counterfactual.training import (
    LoraTraining,
    PixelTraining,
    find_training,
    seeds_of,
)
from dtrak.methods.baselines import vae_latents
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.models.lora import hash_lora
from dtrak.models.unet import digits_model
from dtrak.runs.run import Options
from dtrak.training import fine_tuning as lora_fine_tuning
from dtrak.training import train_lora_options
from dtrak.training.presets import PRESETS
from dtrak.training.trainer import train

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


def test_a_model_nobody_says_how_to_train(changed):
    run = changed()
    (run.parent / "model" / "training.json").unlink()
    with pytest.raises(CounterfactualError, match=r"--preset must say .* no training\.json lies"):
        open_origin(run)
    assert open_origin(run, preset="digits").training.recipe == PRESETS["digits"].recipe
    with pytest.raises(ValueError, match=r"preset must be one of .* did you mean 'digits'"):
        open_origin(run, preset="digit")
    with pytest.raises(CounterfactualError, match="got one for a model of other weights or noise"):
        open_origin(run, preset="cifar2")


def test_a_model_trained_on_other_images(changed):
    run = changed()
    file = run.parent / "model" / "training.json"
    note = json.loads(file.read_text())
    note["settings"]["data"]["fingerprint"] = "0" * 64
    file.write_text(json.dumps(note))
    with pytest.raises(CounterfactualError, match="got one trained on others"):
        open_origin(run)


def test_damaged_notes(changed):
    run = changed()
    file = run.parent / "model" / "training.json"
    note = json.loads(file.read_text())
    settings = note["settings"]
    other = {**settings, "recipe": {**settings["recipe"], "of another version": 1}}
    without = {name: value for name, value in settings.items() if name != "recipe"}
    for damaged in ({}, {"settings": other}, {"settings": without}):
        file.write_text(json.dumps(damaged))
        with pytest.raises(CounterfactualError, match="is damaged: say with --preset how"):
            open_origin(run)


def test_what_dtrak_train_writes_is_understood(tmp_path):
    arguments = ["--preset", "digits", "--steps", "2", "--output", tmp_path, "--device", "cpu"]
    AcceleratorState._reset_state(reset_partial_state=True)
    result = CliRunner().invoke(train_app, [*map(str, arguments)])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert result.exit_code == 0, result.output
    # stands for a run of the main job on that model, without its features
    run = SimpleNamespace(
        options=SimpleNamespace(lora=None), deciding={"model": {}}, model_folder=tmp_path,
        folder=tmp_path,
    )  # fmt: skip
    data = load_data("digits", channels=1, size=8)
    inputs = SimpleNamespace(train=data, queries=data.select([0]), model=load(tmp_path))
    training = find_training(run, inputs, None)
    assert training.recipe == replace(PRESETS["digits"].recipe, steps=2)
    assert training.mixed_precision == "no"
    kept = torch.ones(1000, dtype=torch.bool)
    model = training.retrain(kept, (0, 0), tmp_path, CPU, tmp_path / "a.pt", None)
    assert hash_model(model.module) == hash_model(inputs.model.module)


def test_seeds_are_the_names_of_pictures():
    assert seeds_of(["00003.png", "00120.png"]) == [3, 120]


@pytest.fixture
def fresh_accelerator():
    # it remembers the precision of the first run of a process
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_is_followed(finished, tmp_path, fresh_accelerator):
    origin = open_origin(finished)
    kept = torch.ones(60, dtype=torch.bool)
    full = origin.training.retrain(kept, (5, 5), tmp_path, CPU, tmp_path / "a.pt", None)
    assert hash_model(full.module) == hash_model(origin.load_model().module)
    mixed = replace(origin.training, mixed_precision="bf16")
    found = mixed.retrain(kept, (5, 5), tmp_path, CPU, tmp_path / "b.pt", None)
    from accelerate import Accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    expected = digits_model(5)
    train(
        expected, origin.data.images, RECIPE,
        accelerator=Accelerator(mixed_precision="bf16", cpu=True),
    )  # fmt: skip
    assert hash_model(found.module) == hash_model(expected.module)
    assert hash_model(found.module) != hash_model(full.module)
    assert mixed.identity() != origin.training.identity()


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """A text-to-image run: a LoRA fine-tuned by dtrak.train_lora, and its attribution."""
    folder = tmp_path_factory.mktemp("painted")
    base, pictures = build_pipeline(folder / "base"), write_pictures(folder / "pictures")
    AcceleratorState._reset_state(reset_partial_state=True)
    lora_fine_tuning.run_lora_training(
        train_lora_options.Options(
            output=str(folder / "lora"), model=str(base), data=str(pictures), rank=2, steps=4,
            batch_size=3, learning_rate=0.05, device="cpu",
        ),
        QUIET,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {
        **OPTIONS, "model": str(base), "lora": str(folder / "lora"), "data": str(pictures),
        "prompts": "a ukiyo e painting", "guidance_scale": 2.0, "num_queries": 3,
        "output": str(folder / "run"), "damping": "0.5",
    }  # fmt: skip
    run_attribution(Options(**options), QUIET)
    return folder


def test_a_lora_is_trained_again_as_it_was(painted, tmp_path):
    origin = open_origin(painted / "run")
    training = origin.training
    assert isinstance(training, LoraTraining)
    assert (training.rank, training.guidance_scale) == (2, 2.0)
    assert training.prompts["00001.png"] == "a ukiyo e painting"
    training.prepare(tmp_path, CPU, QUIET)
    kept = torch.ones(5, dtype=torch.bool)
    seed = training.recipe.seed
    model = training.retrain(kept, (seed, seed), tmp_path, CPU, tmp_path / "a.pt", None)
    own = load(painted / "base", painted / "lora")
    assert hash_lora(model.module) == hash_lora(own.module)
    drawn = load_data(next((painted / "run").glob("generated-*")))
    again = training.draw(model, ["00002.png", "00000.png"])
    # drawn in batches of another size
    difference = again.int() - to_uint8(drawn.images[[2, 0]]).int()
    assert difference.abs().max() <= 1
    assert again.float().std() > 1

    # without some images it is the model that dtrak.train_lora trains without them
    kept[[1, 3]] = False
    fewer = training.retrain(kept, (seed, seed), tmp_path, CPU, tmp_path / "b.pt", None)
    names = [
        name for name, is_kept in zip(origin.data.ids, kept.tolist(), strict=True) if not is_kept
    ]
    (tmp_path / "without.txt").write_text("\n".join(names))
    AcceleratorState._reset_state(reset_partial_state=True)
    lora_fine_tuning.run_lora_training(
        train_lora_options.Options(
            output=str(tmp_path / "lora"), model=str(painted / "base"),
            data=str(painted / "pictures"), rank=2, steps=4, batch_size=3, learning_rate=0.05,
            device="cpu", without=str(tmp_path / "without.txt"),
        ),
        QUIET,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    by_hand = load(painted / "base", tmp_path / "lora")
    assert hash_lora(fewer.module) == hash_lora(by_hand.module)
    assert hash_lora(fewer.module) != hash_lora(own.module)


def test_counterfactual_of_a_lora(painted, tmp_path):
    arguments = ["--run", painted / "run", "--queries", "2", "--top-k", "2", "--methods",
                 "d-trak,trak,random", "--output", tmp_path / "cf"]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    results = load_counterfactual(tmp_path / "cf")
    assert set(results.values) == {"pixel_l2", "latent_l2"}
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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"captions": "others"}, "must be trained with the captions of .* got others"),
        ({"rank": 3}, r"got one of rank 3 for \[2\]"),
        ({"data": {"fingerprint": "0", "rows": 5}}, "got one trained on others"),
    ],
)
def test_loras_of_something_else(painted, tmp_path, changes, message):
    with pytest.raises(CounterfactualError, match=message):
        open_origin(edit(painted, tmp_path, **changes))


def test_loras_nobody_says_how_to_train(painted, tmp_path):
    run = edit(painted, tmp_path)
    (tmp_path / "lora" / "training.json").unlink()
    with pytest.raises(CounterfactualError, match=r"--preset must say .* no training\.json"):
        open_origin(run)
    with pytest.raises(CounterfactualError, match="got preset 'cifar2', which fine-tunes nothing"):
        open_origin(run, preset="cifar2")
    with pytest.raises(CounterfactualError, match=r"got one of rank 128 for \[2\]"):
        open_origin(run, preset="artbench2")


def test_the_two_kinds_differ(finished, painted):
    assert isinstance(open_origin(finished).training, PixelTraining)
    assert open_origin(finished).identity() != open_origin(painted / "run").identity()
