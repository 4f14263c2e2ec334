"""Commands whose processes a launcher started: one run, divided, that says everything once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finished_run import make_images, make_run, results
from numerics import relative_error
from safetensors.torch import load_file
from test_sketcher import small_unet
from tiny_stable_diffusion import build_pipeline, write_pictures
from typer.testing import CliRunner

from dtrak.cli.attribute import app
from dtrak.features.store import FeatureStore
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet
from dtrak.runs.workers import one_thread

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SMALL = (
    "--timesteps", "1", "--proj-dim", "256", "--num-queries", "3", "--batch-size", "32",
    "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    UNet(small_unet().float(), linear_process()).save(folder / "model")
    # two shards of training images
    make_images(folder / "data", 600)
    return "--model", folder / "model", "--data", folder / "data", *SMALL


def command(*words, world=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return [sys.executable, *(launcher if world > 1 else []), *map(str, words)]


def run(*words, world=1):
    done = subprocess.run(
        command(*words, world=world), env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    return done.returncode, done.stdout + done.stderr


def here(*words):
    """The same by this process alone, which has imported everything."""
    with one_thread():
        done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output


def read(folder):
    """Scores, and every store of features by its place."""
    scores = load_file(results(folder) / "scores.safetensors")["scores"]
    found = {file.parent for file in (folder / "features-lowrank").rglob("manifest.json")}
    return scores, {place.relative_to(folder): FeatureStore.read(place).load() for place in found}


@pytest.mark.full
def test_three_processes_make_what_one_makes(places, tmp_path):
    here(*places, "--output", tmp_path / "one")
    attribute = ("-m", "dtrak.attribute", *places, "--output")
    code, output = run(*attribute, tmp_path / "three", world=3)
    assert code == 0, output
    (scores, features), (other, others) = read(tmp_path / "one"), read(tmp_path / "three")
    assert relative_error(other, scores) < 1e-6
    assert features.keys() == others.keys()
    assert len(features) == 2
    assert all(torch.equal(features[place], others[place]) for place in features)
    for said in (
        "features of training images: 600 of 600",
        "generate the queries: ",
        "report:",
    ):
        assert output.count(said) == 1, output
    # again: it is finished
    code, output = run(*attribute, tmp_path / "three", world=2)
    assert (code, output.count("scores: ")) == (0, 1), output
    code, output = run(
        *attribute, tmp_path / "three", "--projection", "none", "--proj-dim", 7, world=2
    )
    assert (code != 0, output.count("error: ")) == (True, 1), output


@pytest.mark.full
def test_a_launch_whose_process_is_killed_goes_on(places, tmp_path):
    words = (*places, "--output", tmp_path / "run")
    launch = subprocess.Popen(
        command("-m", "dtrak.attribute", *words, world=2),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    begun = tmp_path / "run" / "features-lowrank"
    while launch.poll() is None and not list(begun.rglob("*-from-*.safetensors")):
        time.sleep(0.05)
    children = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    launch.communicate(timeout=300)
    assert launch.returncode != 0
    kept = {file: file.stat().st_mtime_ns for file in begun.rglob("000???.safetensors")}
    # one process goes on where two were
    here(*words)
    assert all(file.stat().st_mtime_ns == made for file, made in kept.items())
    here(*places, "--output", tmp_path / "whole")
    for place, rows in read(tmp_path / "whole")[1].items():
        assert torch.equal(FeatureStore.read(tmp_path / "run" / place).load(), rows)


@pytest.mark.full
def test_processes_that_were_called_otherwise_are_refused(places, tmp_path):
    words = ("-m", "dtrak.attribute", *places, "--output", tmp_path / "run", "--seed")
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, words), str(rank)],
            env=ENVIRONMENT
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = " ".join("".join(one.communicate(timeout=300)[1] for one in started).split())
    assert [one.returncode for one in started] == [2, 2]
    assert said.count("error: ") == 1
    assert "rank 1 is not: options.seed is 0 in rank 0 and 1" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_models_are_trained_and_measured_once(tmp_path):
    script = Path(__file__).with_name("launched_lds.py")
    code, output = run(script, tmp_path, "prepare")
    assert code == 0, output
    code, output = run(script, tmp_path, "train", "evaluate", world=2)
    assert code == 0, output
    assert output.count("5 of 5 models are trained") == 1, output
    assert output.count("losses of 4 of 4 models are measured") == 1, output
    assert output.count("results: ") == 1, output
    trained = [line for line in output.splitlines() if line.startswith("train ")]
    assert len(set(trained)) == len(trained)


@pytest.mark.full
def test_models_without_some_images_are_trained_once(tmp_path):
    run_folder = make_run(tmp_path)
    words = ("-m", "dtrak.counterfactual", run_folder, "--top-k", 10, "--num-queries", 1,
             "--methods", "trak,random,none", "--device", "cpu", "--output")  # fmt: skip
    assert run(*words, tmp_path / "one")[0] == 0
    code, output = run(*words, tmp_path / "two", world=2)
    assert code == 0, output
    for said in ("retrain 3 models: 18 of 18", "trak whitening: 80 of 80", "values: "):
        assert output.count(said) == 1, output
    first, second = (
        {file.relative_to(place): load_file(file) for file in place.rglob("pictures/*/*/*")}
        for place in (tmp_path / "one", tmp_path / "two")
    )
    assert first.keys() == second.keys()
    assert len(first) == 3
    for name, drawn in first.items():
        assert all(torch.equal(drawn[key], second[name][key]) for key in ("pictures", "losses"))


@pytest.mark.full
def test_processes_encode_what_they_are_trained_on_between_them(tmp_path):
    base = build_pipeline(tmp_path / "base")
    script = Path(__file__).with_name("launched_training.py")
    words = (
        script, "--model", base, "--data", write_pictures(tmp_path / "pictures"), "--lora-rank", 2,
        "--steps", 4, "--batch-size", 4, "--learning-rate", 0.05, "--dropout", 0,
        "--device", "cpu", "--output",
    )  # fmt: skip
    assert run(*words, tmp_path / "one")[0] == 0
    code, output = run(*words, tmp_path / "two", world=2)
    assert code == 0, output
    for said in ("latents of training images: 5 of 5", "train: 4 of 4", "LoRA: "):
        assert output.count(said) == 1, output
    one, two = (FeatureStore.read(tmp_path / name / "latents") for name in ("one", "two"))
    assert one.num_shards == 3
    assert torch.equal(one.load(), two.load())
    one, two = (load_file(*(tmp_path / name).glob("*lora*.safetensors")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    # the batch is the same one, its mean is added up in another order
    assert all(relative_error(two[name], one[name]) < 1e-3 for name in one)


@pytest.mark.full
def test_processes_explain_together(tmp_path):
    script = Path(__file__).with_name("launched_explain.py")
    assert run(script, tmp_path, "one")[0] == 0
    code, output = run(script, tmp_path, "two", world=2)
    assert code == 0, output
    assert output.count("generate the queries: 50 of 50") == 1, output
    assert output.count("features of training images: 60 of 60") == 1, output
    one, *two = (torch.load(tmp_path / name) for name in ("one-0.pt", "two-0.pt", "two-1.pt"))
    for found in two:
        assert torch.equal(found["drawn"], one["drawn"])
        for ours, alone in zip(found["scores"], one["scores"], strict=True):
            assert relative_error(ours, alone) < 1e-6
    assert torch.equal(two[0]["scores"][0], two[1]["scores"][0])
