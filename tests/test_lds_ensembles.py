"""Scores averaged over models of the retrain family, against each model's scores by itself."""

import shutil

import pytest
import torch
from numerics import relative_error
from safetensors.torch import load_file, save_file
from test_lds_methods import BY_NAME, K, features, groups, quiet, ridge, small  # noqa: F401
from tiny_lds import CPU, PRESET, register, trained

from dtrak.evaluation.lds import methods as lds_methods
from dtrak.evaluation.lds.ensembles import ensemble_predictions, find_members
from dtrak.evaluation.lds.experiment import (
    ExperimentError,
    load_experiment,
    prepare,
    train_one,
)
from dtrak.evaluation.lds.methods import Predictor, Setting
from dtrak.evaluation.lds.options import parse_sizes
from dtrak.evaluation.lds.queries import query_sets
from dtrak.features.store import StoreError

MEMBERS = ["retrain-000-1", "retrain-001-1", "retrain-002-1"]


@pytest.fixture(scope="module")
def experiment(trained_lds, tmp_path_factory):
    register()
    folder = shutil.copytree(trained_lds, tmp_path_factory.mktemp("lds") / "run")
    experiment = prepare(folder, PRESET, num_subsets=4, num_retrain=4)
    for name in MEMBERS:
        train_one(experiment, name, CPU)
    return experiment


def predictions(experiment, settings, sizes):
    predictor = Predictor(experiment, query_sets(experiment, CPU), CPU, quiet)
    return list(ensemble_predictions(predictor, settings, sizes))


def test_rows_are_the_float64_mean_of_the_single_models_scores(experiment):
    settings = [
        Setting(BY_NAME["Gradient dot"], 5, "sjlt"),
        *(Setting(BY_NAME[name], 5, kind) for kind in ("sjlt", "none") for name in BY_NAME
          if name in ("D-TRAK", "TRAK")),
        Setting(BY_NAME["Random"]),
    ]  # fmt: skip
    found = predictions(experiment, settings, [2, 3])
    titles = ("single half-data model", "mean of 2 models", "mean of 3 models")
    wanted = [f"{name}, {title}" for name in ("D-TRAK", "TRAK") for title in titles]
    assert [prediction.setting.title for prediction in found] == wanted
    assert {(p.setting.num_timesteps, p.setting.projection) for p in found} == {(5, "sjlt")}
    for start, function in ((0, "mean_squared_l2_norm"), (3, "loss")):
        # of every model by itself: its features, its norm, its ridge, in float64
        scores, dampings = [], []
        for name in MEMBERS:
            train, queries = features(
                experiment, experiment.load_model(name), function, range(0, 1000, 200)
            )
            unit = float(train.square().sum(1).mean())
            dampings.append([factor * unit for factor in lds_methods.DAMPING_FACTORS])
            scores.append([queries @ ridge(train, queries, dampings[-1][n]) for n in (6, 8, 12)])
        for size, prediction in zip((1, 2, 3), found[start : start + 3], strict=True):
            assert prediction.kinds == ("validation", "generated")
            assert prediction.rules == (*(f"{f:g}" for f in lds_methods.DAMPING_FACTORS), "auto")
            for place, number in enumerate((6, 8, 12)):
                mean = sum(each[place] for each in scores[:size]) / size
                expected = groups(experiment, mean)
                assert relative_error(prediction.values[number], expected) < 1e-4
                damping = sum(each[number] for each in dampings[:size]) / size
                assert prediction.dampings[number] == pytest.approx(damping, rel=1e-5)
        # the models differ, or the mean would say nothing
        assert relative_error(found[start].values[8], found[start + 2].values[8]) > 1e-2


def test_predictions_of_members_are_kept(experiment, monkeypatch):
    settings = [Setting(BY_NAME["D-TRAK"], 5, "sjlt")]
    before = predictions(experiment, settings, [2])
    monkeypatch.setattr(
        lds_methods.FusedExtractor, "extract", lambda *_: pytest.fail("computed again")
    )
    after = predictions(experiment, settings, [2])
    assert [torch.equal(a.values, b.values) for a, b in zip(before, after, strict=True)] == [
        True
    ] * 2
    full = experiment.folder / "predictions" / "d-trak-sjlt-5.safetensors"
    assert not full.exists(), "the full model is no member"


def test_a_member_that_was_trained_anew_is_not_passed_over(experiment, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(experiment.folder, folder)
    copy = load_experiment(folder)
    settings = [Setting(BY_NAME["TRAK"], 5, "sjlt")]
    before = predictions(copy, settings, [2])
    # the same subset, but not the same weights
    weights = next(copy.model_folder(MEMBERS[0]).rglob("*.safetensors"))
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights)
    # features say whose they are: those of the old model are refused
    with pytest.raises(StoreError, match="made with other settings: model is"):
        predictions(copy, settings, [2])
    for place in (folder / "features").glob(f"*-{MEMBERS[0]}"):
        shutil.rmtree(place)
    after = predictions(copy, settings, [2])
    for one, other in zip(before, after, strict=True):
        assert relative_error(one.values[8], other.values[8]) > 1e-2


def test_what_is_needed_is_said(experiment, tmp_path):
    assert find_members(experiment, 3) == MEMBERS
    with pytest.raises(
        ExperimentError, match=r"'retrain-003-1' is not: run train --family retrain"
    ):
        find_members(experiment, 4)
    with pytest.raises(ExperimentError, match=r"5 subsets or more, .* has 4 .*--num-retrain 5"):
        find_members(experiment, 5)
    # models that scores are judged on never stand in
    without = trained(tmp_path / "run", num_subsets=2)
    with pytest.raises(ExperimentError, match=r"--ensemble 2 must have a retrain family .* has 0"):
        find_members(without, 2)


def test_sizes():
    assert parse_sizes("8") == [8]
    assert parse_sizes("8,2, 4,2") == [2, 4, 8]
    for text in ("1", "0,8", "x", "", "2.5"):
        with pytest.raises(ValueError, match="--ensemble must be numbers of models, at least 2"):
            parse_sizes(text)
