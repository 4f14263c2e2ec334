"""The command, from the first subset to the table, and every way it can be misused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import rankdata
from sklearn.linear_model import RidgeCV
from tiny_lds import CPU, NAME, PRESET, register
from typer.testing import CliRunner

import dtrak
from dtrak.cli import lds_stages
from dtrak.cli.lds import app
from dtrak.evaluation.lds import methods as lds_methods
from dtrak.evaluation.lds import names
from dtrak.evaluation.lds.experiment import load_experiment, prepare, train_one
from dtrak.evaluation.lds.statistics import choose_damping, lds_per_query
from dtrak.evaluation.lds.table import load_results
from dtrak.models.hashing import hash_model
from dtrak.runs.measure import format_bytes
from dtrak.training.presets import PRESETS

METHODS = tuple(
    method
    for method in lds_methods.METHODS
    if method.title in ("D-TRAK", "TRAK", "Gradient dot", "Random")
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    register()
    monkeypatch.setattr(names, "METHODS", METHODS)
    monkeypatch.setattr(lds_methods, "DEFAULT_PROJ_DIM", {"sjlt": 512, "none": 0})


@pytest.fixture
def run(tmp_path):
    """Run a sub-command on the tiny preset; gives (exit code, everything printed)."""

    def run(command, *arguments, output=tmp_path / "run"):
        fixed = ["--preset", NAME, *(["--output", str(output)] if output else [])]
        result = CliRunner().invoke(app, [command, *fixed, *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return run


SMALL = ("--loss-timesteps", 4, "--noise-seeds", 1, "--timesteps", "2,5")


def test_from_the_first_subset_to_the_table(run, tmp_path, monkeypatch):
    code, text = run("prepare", "--num-subsets", 4)
    assert (code, "4 subsets of 20 of 40 images, 5 models to train" in text) == (0, True)
    code, text = run("train", "--last", 3)
    assert (code, "4 of 4 models are trained" in text) == (0, True)
    for option in ("--loss-timesteps", "--timesteps"):
        code, text = run("evaluate", *SMALL, option, "1001")
        assert (code, f"{option} must be at most 1000, the model's number" in text) == (2, True)
    assert not (tmp_path / "run" / "losses").exists(), "said before losses are measured"
    code, text = run("evaluate", *SMALL)
    assert code == 2
    assert "models must be trained on at least 4 subsets, with every seed, got 3" in text
    assert not (tmp_path / "run" / "losses").exists(), "said before losses are measured"
    code, text = run("evaluate", *SMALL, "--losses-only")
    assert (code, "losses of 3 of 4 models are measured" in text) == (0, True)
    assert "losses: 11 queries under 3 models to measure, 528 B on disk, " in text
    code, text = run("train")
    assert (code, "5 of 5 models are trained" in text) == (0, True)
    assert "train 003-1" in text
    assert "train 002-1" not in text, "what was finished is not trained again"
    code, text = run("evaluate", *SMALL)
    assert (code, "losses of 4 of 4 models are measured" in text) == (0, True)
    assert "losses 003-1" in text
    assert "losses 002-1" not in text
    assert "losses: 11 queries under 1 model to measure" in text
    # a subset model that is another one now
    again = tmp_path / "run" / "models" / "002-1"
    shutil.rmtree(again)
    shutil.copytree(again.with_name("001-1"), again)
    code, text = run("evaluate", *SMALL)
    assert (code, "trained anew since their losses were measured: 002-1" in text) == (0, True)
    assert "losses of 4 of 4 models are measured" in text
    assert ("losses 002-1" in text, "losses 003-1" in text) == (True, False)
    features = tmp_path / "run" / "features"
    size = sum(file.stat().st_size for file in features.rglob("*") if file.is_file())
    assert f"features: {features} takes {format_bytes(size)}; they save time" in text
    # they may be deleted: what was predicted is kept
    shutil.rmtree(features)
    code, text = run("evaluate", *SMALL)
    assert (code, "features" in text, features.exists()) == (0, False, False)
    results = load_results(tmp_path / "run" / "results.npz")
    assert results.about["subsets"] == [0, 1, 2, 3]
    assert results.about["steps"] == 8
    assert [(e.method, e.num_timesteps) for e in results.entries] == [
        ("Random", 0),
        *((m.title, S) for S in (2, 5) for m in METHODS if m.output_function),
        *((f"{title}, whitened", S) for S in (2, 5) for title in ("D-TRAK", "TRAK")),
        ("Empirical influence, cross-fitted", 0),
    ]
    page = tmp_path / "table.md"
    code, text = run("report", "--resamples", 1000, "--markdown", page)
    assert code == 0
    assert "tiny, 6 validation queries, 4 models" in text
    assert "# Linear datamodelling score: tiny" in page.read_text(encoding="utf-8")
    report = tmp_path / "run" / "report"
    table = json.loads((report / "table.json").read_text())
    assert len(table["rows"]) == 2 * len(results.entries)
    assert {file.name for file in report.glob("*.png")} == {
        f"lds-{plot}-{kind}.png"
        for plot in ("damping", "timesteps", "methods")
        for kind in ("validation", "generated")
    }
    # a table that is there is shown at once
    monkeypatch.setattr(lds_stages, "make_table", lambda *_, **__: pytest.fail("computed again"))
    assert run("report", "--resamples", 1000)[0] == 0
    # and more subsets can be added afterwards
    monkeypatch.undo()
    register()
    code, text = run("prepare", "--num-subsets", 5)
    assert (code, "5 subsets" in text) == (0, True)


# slow: two trainings; test_counterfactual_origin.py has one that was trained anew
@pytest.mark.full
def test_a_full_model_that_was_trained_anew(run, tmp_path):
    folder = tmp_path / "run"
    assert run("prepare", "--num-subsets", 4)[0] == 0
    assert run("train")[0] == 0
    assert run("evaluate", *SMALL)[0] == 0
    full = folder / "models" / "full"
    shutil.rmtree(full)
    shutil.copytree(full.with_name("000-1"), full)
    losses = {file: file.read_bytes() for file in (folder / "losses").iterdir()}
    code, text = run("evaluate", *SMALL)
    places = f"{folder / 'generated'} and {folder / 'features'}"
    assert (code, f"another full model drew than the one in {folder / 'models'}" in text) == (
        2,
        True,
    )
    assert f"delete {places} to draw them anew, which measures all losses again" in text
    assert {file: file.read_bytes() for file in (folder / "losses").iterdir()} == losses
    # what is said does it
    for place in ("generated", "features"):
        shutil.rmtree(folder / place)
    code, text = run("evaluate", *SMALL)
    assert code == 0, text
    names = ", ".join(f"{number:03d}-1" for number in range(4))
    assert f"queries drawn anew since their losses were measured: {names}" in text
    assert "losses 003-1" in text
    code, text = run("evaluate", *SMALL)
    assert (code, "anew" in text, "losses 003-1" in text) == (0, False, False)


# slow: ten more models; the means are in test_lds_ensembles.py
@pytest.mark.full
def test_a_retrain_family_ensembles_and_clip(run, tmp_path, clip_folder):
    code, text = run("prepare", "--num-subsets", 4, "--num-retrain", 10)
    assert (code, "retrain family: 10 subsets more" in text) == (0, True)
    assert run("train")[0] == 0
    code, text = run("evaluate", *SMALL[:-1], 2, "--ensemble", "2")
    assert (code, "'retrain-000-1' is not: run train --family retrain" in text) == (2, True)
    assert not (tmp_path / "run" / "losses").exists(), "said before losses are measured"
    code, text = run("train", "--family", "retrain", "--first", 1, "--last", 4)
    assert (code, "4 of 4 models are trained" in text) == (0, True)
    code, text = run("evaluate", *SMALL[:-1], 2)
    assert (code, "of the retrain family 10 models must be measured, got 3" in text) == (0, True)
    results = load_results(tmp_path / "run" / "results.npz")
    assert results.entries[-1].method == "Empirical influence, cross-fitted"
    code, text = run("train", "--family", "retrain", "--processes", 1)
    assert (code, "11 of 11 models are trained" in text) == (0, True)
    assert "train retrain-000-1" in text
    assert "train retrain-001-1" not in text
    code, text = run("evaluate", *SMALL[:-1], 2, "--ensemble", "2", "--clip", clip_folder)
    assert (code, "retrain family: losses of 10 of 10 models are measured" in text) == (0, True)
    members = (tmp_path / "run" / "features").glob("*-retrain-00[01]-1*")
    size = sum(file.stat().st_size for each in members for file in each.rglob("*.*"))
    assert size > 0
    assert f", {format_bytes(size)} of it of ensembles; they save time" in text
    assert "losses retrain-001-1" not in text, "what was measured is not measured again"
    results = load_results(tmp_path / "run" / "results.npz")
    names = [entry.method for entry in results.entries]
    added = [
        "Random", "CLIP, dot", "CLIP, cosine", "D-TRAK", "TRAK", "Gradient dot",
        "D-TRAK, whitened", "TRAK, whitened",
        *(f"{name}, {title}"
          for name in ("D-TRAK", "TRAK", "D-TRAK, whitened", "TRAK, whitened")
          for title in ("single half-data model", "mean of 2 models")),
        "Empirical influence, 10 models", "Datamodel, 10 models",
    ]  # fmt: skip
    assert names == added
    assert results.about["retrain"] == {"models": 10, "subsets": list(range(10)), "seed": 1}
    experiment = load_experiment(tmp_path / "run")
    assert torch.equal(results.retrain.subsets, experiment.retrain)
    # fitted to the family, judged on the others
    losses = torch.cat(list(results.retrain.losses.values()), 1).double().numpy()
    ridge = RidgeCV(alphas=(0.1, 1.0, 10.0), cv=5).fit(experiment.retrain.numpy(), losses[:, 7])
    expected = rankdata(ridge.predict(experiment.subsets.numpy())) - 1
    assert results.entries[-1].ranks[0, :, 7].tolist() == expected.tolist()
    page = tmp_path / "table.md"
    assert run("report", "--resamples", 1000, "--markdown", page)[0] == 0
    text = page.read_text(encoding="utf-8")
    for name in added[-6:]:
        assert f"| {name} |" in text
    assert "which nothing is judged on" in text
    assert "cross-fitted" not in text
    assert "D-TRAK, mean of 2 models - D-TRAK, single half-data model" in text


def test_the_table_of_the_package_is_shown_without_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", "--preset", "digits"])
    assert result.exit_code == 0, result.output
    assert "these are the results in the package" in result.output
    assert "D-TRAK" in result.output
    assert (tmp_path / "runs" / "lds-digits" / "report" / "lds-methods-validation.png").is_file()
    # the report in the folder is no obstacle to a run of one's own
    register()
    monkeypatch.setitem(PRESETS, "digits", replace(PRESET, name="digits"))
    assert CliRunner().invoke(app, ["prepare", "--num-subsets", "2"]).exit_code == 0


# slow: two processes of the whole command
@pytest.mark.full
def test_several_commands_train_one_run(tmp_path):
    # two processes of this package on one folder, started together
    folder = tmp_path / "run"
    experiment = prepare(folder, PRESET, num_subsets=4)
    code = (
        "import tiny_lds, sys\n"
        "tiny_lds.register()\n"
        "from dtrak.lds import main\n"
        f"main(['train', '--preset', 'tiny', '--output', {str(folder)!r}])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    texts = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], texts
    for name in ("full", *experiment.names()):
        assert experiment.is_trained(name)
        # each by one of the two
        assert sum(f"train {name}:" in text for text in texts) == 1, (name, texts)


@pytest.fixture
def endless(tmp_path, monkeypatch):
    """An experiment whose trainings do not end by themselves."""
    slow = replace(PRESET, recipe=replace(PRESET.recipe, steps=100_000))
    monkeypatch.setitem(PRESETS, NAME, slow)
    return prepare(tmp_path / "run", slow, num_subsets=2)


def check_it_goes_on(experiment):
    first = []

    def stop(done, total):
        first.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_one(experiment, "full", CPU, stop)
    assert first[0] > 50


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_in_a_training_and_the_run_goes_on(run, endless):
    """A real signal, to this process."""
    checkpoint, ended = endless.folder / "training" / "full.pt", threading.Event()

    def interrupt():
        while not checkpoint.is_file():
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    waiting = threading.Thread(target=interrupt)
    waiting.start()
    try:
        code, text = run("train")
    finally:
        ended.set()
        waiting.join()
        signal.signal(signal.SIGINT, before)
    assert code == 130, text
    assert "interrupted: run the same command again" in text
    assert "Traceback" not in text
    check_it_goes_on(endless)


# slow: a process of its own; the same signal is sent to this one above
@pytest.mark.full
def test_ctrl_c_ends_without_a_traceback_and_the_run_goes_on(endless):
    folder = endless.folder
    code = (
        "import tiny_lds\n"
        "from dataclasses import replace\n"
        "tiny_lds.PRESET = replace(tiny_lds.PRESET, "
        "recipe=replace(tiny_lds.PRESET.recipe, steps=100_000))\n"
        "tiny_lds.register()\n"
        "from dtrak.lds import main\n"
        f"main(['train', '--preset', 'tiny', '--output', {str(folder)!r}])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    run = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    )
    checkpoint = folder / "training" / "full.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert checkpoint.is_file()
    run.send_signal(signal.SIGINT)
    text = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "interrupted: run the same command again" in text
    assert "Traceback" not in text
    check_it_goes_on(endless)


def test_a_trained_model_does_not_depend_on_what_else_was_trained(run, tmp_path):
    run("prepare", "--num-subsets", 4)
    run("train", "--first", 2, "--last", 3)
    experiment = load_experiment(tmp_path / "run")
    alone = hash_model(experiment.load_model("002-1").module)
    other = tmp_path / "other"
    run("prepare", "--num-subsets", 6, "--num-model-seeds", 2, output=other)
    run("train", "--last", 3, output=other)
    assert hash_model(load_experiment(other).load_model("002-1").module) == alone


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prepare", "--num-subsets", "0"], "num_subsets must be at least 1, got 0"),
        (["prepare", "--num-validation", "9"], "num_validation must be at most 6"),
        (["train"], "must be a folder that prepare made, got no experiment.json"),
        (["evaluate"], "must be a folder that prepare made, got no experiment.json"),
        (["evaluate", "--timesteps", "10,x"], "--timesteps must be positive integers, got '10,x'"),
        (["evaluate", "--projection", "sjl"], "got 'sjl'; did you mean 'sjlt'?"),
        (["evaluate", "--ensemble", "1"], "numbers of models, at least 2, separated by commas"),
        (["evaluate", "--family", "retrian"], "got 'retrian'; did you mean 'retrain'?"),
        (["prepare", "--num-retrain", "-1"], "num_retrain must be at least 0, got -1"),
        (["train", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["evaluate", "--processes", "-1"], "--processes must be at least 1, got -1"),
        (["evaluate", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["evaluate", "--loss-timesteps", "0"], "num_timesteps must be at least 1, got 0"),
        (["evaluate", "--noise-seeds", "-1"], "num_noise_seeds must be at least 1, got -1"),
        (["report"], "must hold results.npz: run evaluate first"),
        (["report", "--resamples", "999"], "--resamples must be at least 1000, got 999"),
    ],
)
def test_mistakes_are_one_line_and_two(run, tmp_path, arguments, message):
    code, text = run(*arguments)
    assert code == 2
    assert message in text
    assert text.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_another_preset_than_the_runs_is_refused(run, tmp_path):
    folder = tmp_path / "run"

    def command(*arguments):
        result = CliRunner().invoke(app, [*arguments, "--output", str(folder)])
        return result.exit_code, " ".join(result.output.split())

    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert run("prepare", "--num-subsets", 2)[0] == 0
    before = files()
    message = f"--preset must be 'tiny', whose run {folder} holds, or left out, got 'digits'"
    for name in ("prepare", "train", "evaluate", "report"):
        code, text = command(name, "--preset", "digits")
        assert (code, message in text, text.count("error:")) == (2, True, 1), text
    code, text = command("train", "--preset", "digit")
    assert (code, "did you mean 'digits'?" in text) == (2, True)
    assert files() == before
    # not said, it is the run's
    code, text = command("prepare", "--num-subsets", "3")
    assert (code, "3 subsets of 20 of 40 images" in text) == (0, True)
    code, text = command("train", "--last", "1")
    assert (code, "2 of 2 models are trained" in text) == (0, True)
    # results say whose they are, also by themselves
    (folder / "experiment.json").unlink()
    shutil.copy(Path(dtrak.__file__).parent / "lds_results" / "digits.npz", folder / "results.npz")
    code, text = run("report")
    assert (code, "--preset must be 'digits', whose run" in text) == (2, True)


def test_mistakes_in_a_prepared_run(run, tmp_path):
    assert run("prepare", "--num-subsets", 2)[0] == 0
    for command in ("train", "evaluate"):
        code, text = run(command, "--family", "retrain")
        assert (code, "must have a retrain family: run prepare with --num" in text) == (2, True)
    code, text = run("evaluate", "--clip", "absent")
    assert (code, "CLIP must be an existing folder" in text) == (2, True)
    code, text = run("train", "--device", "tpu")
    assert (code, "--device must be auto, cpu, cuda or cuda:N, got 'tpu'" in text) == (2, True)
    code, text = run("evaluate", *SMALL)
    assert (code, "model 'full' of" in text) == (2, True)
    result = CliRunner().invoke(app, ["prepare", "--preset", "digit"])
    assert result.exit_code == 2
    assert "did you mean 'digits'?" in " ".join(result.output.split())


def test_the_metric_is_where_it_was():
    assert (
        choose_damping.__module__ == lds_per_query.__module__ == "dtrak.evaluation.lds.statistics"
    )
