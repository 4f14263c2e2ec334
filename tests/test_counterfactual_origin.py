"""Which model is trained anew, and how it is known."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_run import OPTIONS, RECIPE, results
from numerics import relative_error
from rich.console import Console
from tiny_lds import trained

from dtrak.cli.attribution import run_attribution
from dtrak.data.images import load_data
from dtrak.evaluation.counterfactual.origin import open_origin
from dtrak.evaluation.counterfactual.results import CounterfactualError
from dtrak.evaluation.lds import experiment as lds_experiment
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.runs import inputs
from dtrak.runs.files import claim
from dtrak.runs.results import load_attribution
from dtrak.runs.run import Options
from dtrak.training.presets import PRESETS
from dtrak.training.trainer import Recipe, train

CPU, QUIET = torch.device("cpu"), Console(quiet=True)


@pytest.fixture
def opened(tmp_path):
    """Open a run for an experiment in a folder of its own."""
    return lambda folder, **options: open_origin(folder, tmp_path / "experiment", **options)


def test_the_recipe_is_what_the_trainer_wrote(finished, opened):
    origin = opened(finished)
    assert origin.retraining.recipe == RECIPE
    assert origin.retraining.drawing.num_inference_steps == 50
    assert origin.queries.ids == [f"{n:05d}.png" for n in range(4)]
    assert (len(origin.data), origin.preset) == (60, "digits")
    # that recipe does train the model of the run
    model = origin.retraining.fresh(RECIPE.seed, CPU)
    train(model, origin.data.images, origin.retraining.recipe)
    assert hash_model(model.module) == hash_model(origin.load_model().module)
    assert origin.identity()["model"] == {"model": hash_model(model.module)}
    assert origin.identity()["training"]["recipe"] == RECIPE.to_dict()


# slow: features of another method; the cases beside it open the same run
@pytest.mark.full
def test_the_runs_own_scores_are_used_and_others_computed(finished, tmp_path, opened):
    origin = opened(finished)
    own = origin.gradient_scores("mean_squared_l2_norm", tmp_path / "own", CPU, QUIET)
    assert torch.equal(own, load_attribution(finished).scores)
    assert not (tmp_path / "own").exists()
    # what the main job gives for the other output function
    options = load_attribution(finished).options
    again = replace(options, output=str(tmp_path / "loss"), output_function="loss",
                    queries=str(finished / "generated"))  # fmt: skip
    run_attribution(again, QUIET)
    expected = load_attribution(tmp_path / "loss").scores
    found = origin.gradient_scores("loss", tmp_path / "trak", CPU, QUIET)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(own, expected) > 0.1
    assert torch.equal(found, origin.gradient_scores("loss", tmp_path / "trak", CPU, QUIET))


# test_lds_methods.py has two commands that make features once
@pytest.mark.full
def test_features_another_command_makes_are_waited_for(finished, tmp_path, opened):
    origin, folder, found = opened(finished), tmp_path / "trak", []
    arguments = "loss", folder, CPU, QUIET
    other = threading.Thread(target=lambda: found.append(origin.gradient_scores(*arguments)))
    with claim(folder / "locks" / "features.lock") as ours:
        assert ours
        other.start()
        other.join(1)
        assert other.is_alive()
        assert not (folder / "train").exists()
    other.join(60)
    assert torch.equal(found[0], origin.gradient_scores(*arguments))


def test_other_timesteps_need_other_scores(finished, opened):
    assert opened(finished, timesteps=2).scores
    origin = opened(finished, timesteps=4)
    assert origin.settings.timesteps == (0, 250, 500, 750)
    assert not origin.scores
    with pytest.raises(ValueError, match="timesteps"):
        opened(finished, timesteps=0)


# slow: a training; runs of others are in the fast lane
@pytest.mark.full
def test_a_run_that_trained_its_own_model(tmp_path, monkeypatch, opened):
    recipe = Recipe(steps=3, batch_size=8)
    monkeypatch.setattr(inputs, "Recipe", lambda: recipe)
    options = {**OPTIONS, "output": str(tmp_path / "run"), "timesteps": "1", "num_queries": 1}
    run_attribution(Options(**options), QUIET)
    origin = opened(tmp_path / "run")
    assert origin.retraining.recipe == recipe
    own = load(tmp_path / "run" / "model")
    assert hash_model(origin.load_model().module) == hash_model(own.module)
    assert len(origin.data) == 1000


def test_a_run_of_the_lds(tmp_path, monkeypatch, opened):
    tiny = replace(
        PRESETS["digits"], name="tiny", recipe=Recipe(steps=4, batch_size=8), num_inference_steps=2
    )
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    # the digits come with the package, whatever the preset is called
    monkeypatch.setattr(
        type(tiny), "load_data", lambda self, split, source=None, **options: load_data(
            "digits", channels=1, size=8, split=split, **options
        )
    )  # fmt: skip
    folder = tmp_path / "lds"
    experiment = lds_experiment.prepare(folder, tiny, num_subsets=1, num_generated=3)
    with pytest.raises(ValueError, match="not trained yet"):
        opened(folder)
    lds_experiment.train_one(experiment, lds_experiment.FULL, CPU)
    origin = opened(folder, timesteps=5)
    assert origin.retraining.recipe == tiny.recipe
    assert origin.retraining.drawing.num_inference_steps == 2
    assert origin.queries.ids == ["00000.png", "00001.png", "00002.png"]
    assert origin.settings.timesteps == (0, 200, 400, 600, 800)
    assert not origin.scores
    assert origin.preset == "tiny"
    assert hash_model(origin.load_model().module) == hash_model(experiment.load_model().module)


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


def test_queries_that_were_not_drawn(changed, opened):
    with pytest.raises(CounterfactualError, match="must be generated to be drawn again, got 'val"):
        opened(changed(queries="validation"))


def test_folders_without_a_run(tmp_path, opened):
    with pytest.raises(FileNotFoundError, match="a run must be an existing folder"):
        opened(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"must be a finished run of dtrak\.attribute"):
        opened(Path(tmp_path))


def test_an_lds_run_whose_full_model_was_trained_anew(tmp_path, opened):
    experiment = trained(tmp_path / "lds", num_subsets=1)
    assert len(opened(experiment.folder).queries) == 5
    full = experiment.model_folder("full")
    shutil.rmtree(full)
    shutil.copytree(full.with_name("000-1"), full)
    with pytest.raises(lds_experiment.ExperimentError, match="another full model drew"):
        opened(experiment.folder)
