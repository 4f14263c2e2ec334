"""Scores of several runs averaged: against the runs' own, and every way they may not fit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from finished_run import OPTIONS, RECIPE, make_model, results
from numerics import relative_error
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from dtrak.cli.attribution import run_attribution
from dtrak.cli.ensemble import app
from dtrak.methods.ensemble import average_runs
from dtrak.runs.results import ResultsError, read_scores
from dtrak.runs.run import Options


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Two models trained alike but for their seed, which explain the pictures of the first."""
    folder, first = tmp_path_factory.mktemp("ensemble"), finished
    images, second = first.parent / "images", folder / "second"
    model = make_model(folder / "other", images, replace(RECIPE, seed=6))
    places = {"model": str(model), "data": str(images), "output": str(second)}
    options = {**OPTIONS, **places, "queries": str(first / "generated"), "batch_size": 32}
    run_attribution(Options(**options), Console(quiet=True))
    return first, second


def test_the_file_holds_the_float64_mean_of_the_runs(runs, tmp_path):
    file = tmp_path / "new" / "mean.safetensors"
    result = CliRunner().invoke(app, [*map(str, runs), "--output", str(file)])
    assert result.exit_code == 0, result.output
    assert "mean scores of 2 models, 4 pictures by 60" in " ".join(result.output.split())
    each = [load_file(results(run) / "scores.safetensors")["scores"].double() for run in runs]
    assert relative_error(each[0], each[1]) > 1e-2
    scores, metadata = read_scores(file)
    assert relative_error(scores, (each[0] + each[1]) / 2) < 1e-6
    own = read_scores(results(runs[0]) / "scores.safetensors")[1]
    assert (metadata["rows"], metadata["columns"]) == (own["rows"], own["columns"])
    settings = json.loads(metadata["settings"])
    assert settings["output function"] == "mean_squared_l2_norm"
    assert len({part["model"] for part in settings["mean of"]}) == 2


def test_sets_of_queries_are_matched_by_their_pictures(runs, tmp_path):
    """Whatever they are called, and whatever else has been explained since."""
    first, second = tmp_path / "first", tmp_path / "second"
    for run, copy in zip(runs, (first, second), strict=True):
        shutil.copytree(run, copy)
    (more,) = (path for path in (second / "queries").iterdir())
    other = shutil.copytree(more, second / "queries" / "others-00000000")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"queries": "0"}))
    expected = average_runs(runs, tmp_path / "expected.safetensors")
    found = average_runs([first, second], tmp_path / "mean.safetensors")
    assert torch.equal(found, expected)
    # two sets in common: one must be named, in the first run's words
    copied = shutil.copytree(results(first), first / "queries" / "mine-11111111")
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"queries": "0"}))
    with pytest.raises(ResultsError, match=r"must name one of .* \(gen\S+, mine-11111111, as"):
        average_runs([first, second], tmp_path / "mean.safetensors")
    found = average_runs([first, second], tmp_path / "mean.safetensors", "gen")
    assert torch.equal(found, expected)
    average_runs([first, second], tmp_path / "mean.safetensors", "mine")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": "0"}, "must have the training images of .* got others"),
        ({"captions": "0"}, "must have the captions of the training images of"),
        ({"queries": "0"}, r"must have the pictures \(--queries\) of"),
        ({"queries": None}, "must say which pictures it explains"),
        (
            {"settings": {"method": "d-trak", "output function": "loss"}},
            "mean_squared_l2_norm, got loss",
        ),
        ({"settings": {"method": "raw-pixels-dot"}}, "d-trak, got raw-pixels-dot"),
    ],
)
def test_runs_that_do_not_fit_are_refused(runs, tmp_path, change, message):
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    manifest = json.loads((results(other) / "manifest.json").read_text())
    (results(other) / "manifest.json").write_text(json.dumps(manifest | change))
    for pair in ((runs[0], other), (other, runs[0])):
        with pytest.raises(ResultsError, match=message if pair[1] == other else "must "):
            average_runs(pair, tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()


def test_mistakes_are_one_line_and_two(runs, tmp_path):
    a, b = map(str, runs)
    for arguments, message in (
        ([a, "--output", "m.safetensors"], "runs must be two or more"),
        ([a, b, a, "--output", "m.safetensors"], "each given once"),
        ([a, b, "--output", "mean.pt"], "--output must be a file *.safetensors, got mean.pt"),
        ([a, str(tmp_path), "--output", "m.safetensors"], "must be a finished run"),
        ([a, str(tmp_path / "no"), "--output", "m.safetensors"], "must be an existing folder"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_every_run_counts_once(runs, tmp_path):
    # a model that comes twice counts twice: the mean is over runs
    third = tmp_path / "copy"
    shutil.copytree(runs[0], third)
    found = average_runs([*runs, third], tmp_path / "mean.safetensors").double()
    each = [load_file(results(run) / "scores.safetensors")["scores"].double() for run in runs]
    assert relative_error(found, (2 * each[0] + each[1]) / 3) < 1e-6
    assert torch.isfinite(found).all()
