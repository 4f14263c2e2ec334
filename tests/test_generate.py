"""The generating command."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partialmethod

import numpy as np
import pytest
import torch
from claims import claimed_elsewhere
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_model
from typer.testing import CliRunner

from dtrak.cli.generate import app
from dtrak.data.images import load_data, to_uint8
from dtrak.models.process import linear_process
from dtrak.runs.files import LOCK_FILE
from dtrak.runs.ranks import Ranks
from dtrak.training import drawing
from dtrak.training.drawing import draw_all

SMALL = ["--num-images", "3", "--num-inference-steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(3).save(folder)
    return folder


@pytest.fixture
def run(model_folder, tmp_path):
    """Run the command; gives (exit code, everything printed)."""

    def run(*arguments, model=model_folder, output=tmp_path / "drawn"):
        fixed = ["--model", str(model), "--output", str(output), *SMALL]
        result = CliRunner().invoke(app, [*fixed, *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return run


def failing(run, message, *arguments, **options):
    code, output = run(*arguments, **options)
    assert code == 2, output
    assert message in output


def drawn(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_one_picture_a_seed(run, tmp_path):
    assert run("--batch-size", "2")[0] == 0
    expected = to_uint8(draw_all(tiny_model(3), range(3), num_inference_steps=4))
    folder = tmp_path / "drawn"
    assert list(drawn(folder)) == ["00000.png", "00001.png", "00002.png"]
    # in batches of another size a product may be rounded otherwise: at most a level
    for name, pixels in zip(drawn(folder), expected, strict=True):
        with Image.open(folder / name) as image:
            levels = torch.from_numpy(np.asarray(image).astype(np.int32))
        assert (levels - pixels[0].int()).abs().max() <= 1
    assert len(load_data(folder)) == 3
    settings = json.loads((folder / "generation.json").read_text())["settings"]
    assert settings["num_inference_steps"] == 4
    assert "trajectories" not in os.listdir(folder)


def test_several_processes_draw_what_one_draws(run, tmp_path, monkeypatch):
    assert run("--batch-size", "2", "--num-images", "5")[0] == 0
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    # what they leave word in, which here nobody else looks into
    monkeypatch.setattr(Ranks, "agree", lambda *_: None)
    words, shared = ("--batch-size", "2", "--num-images", "5"), tmp_path / "shared"
    begun, draw = [], drawing.draw_missing

    def noted(model, seeds, *rest, **how):
        begun.append(list(seeds))
        draw(model, seeds, *rest, **how)

    monkeypatch.setattr(drawing, "draw_missing", noted)
    monkeypatch.setattr(Ranks, "divide", partialmethod(Ranks.divide, only_own=True))
    assert run(*words, output=shared)[0] == 0
    monkeypatch.setenv("RANK", "1")
    assert run(*words, output=shared)[0] == 0
    assert begun == [[0, 1], [4], [2, 3]]
    assert drawn(shared) == drawn(tmp_path / "drawn")


def test_more_are_added_and_none_drawn_again(run, tmp_path):
    assert run()[0] == 0
    folder = tmp_path / "drawn"
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    code, output = run()
    assert code == 0
    assert "already drawn" in output
    assert run("--first-seed", "2", "--num-images", "3")[0] == 0
    assert list(drawn(folder)) == [f"{seed:05d}.png" for seed in range(5)]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert run("--first-seed", "4", "--num-images", "1", output=tmp_path / "other")[0] == 0
    assert drawn(tmp_path / "other") == {"00004.png": drawn(folder)["00004.png"]}


def trajectories(folder):
    files = sorted((folder / "trajectories").iterdir())
    return torch.stack([load_file(file)["predicted_clean"] for file in files])


def test_trajectories(run, tmp_path):
    assert run()[0] == 0
    folder = tmp_path / "drawn"
    pictures = drawn(folder)
    code, output = run("--trajectories")
    assert code == 0, output
    assert drawn(folder) == pictures
    paths = trajectories(folder)
    assert (paths.shape, paths.dtype) == ((3, 4, 1, 8, 8), torch.float32)
    # the last predicted clean image is the picture: the final step adds no noise
    expected = load_data(folder).images
    assert (paths[:, -1] - expected).abs().max() <= 1 / 255 + 1e-6
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    assert run("--trajectories")[0] == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before
    (folder / "trajectories" / "00001.safetensors").unlink()
    assert run("--trajectories")[0] == 0
    # alone in its batch it may be rounded otherwise
    assert (trajectories(folder) - paths).abs().max() < 1e-3


def test_commands_share_a_folder_but_no_picture(run, tmp_path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    with claimed_elsewhere(folder, range(2, 5)):
        failing(run, "error: another command is at work in")
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        assert run("--num-images", "2")[0] == 0
        assert run("--first-seed", "5", "--num-images", "1")[0] == 0
        assert list(drawn(folder)) == ["00000.png", "00001.png", "00005.png"]
    assert run("--num-images", "6")[0] == 0
    assert len(drawn(folder)) == len(load_data(folder)) == 6


def test_other_settings_are_refused(run, tmp_path):
    assert run()[0] == 0
    failing(run, "num_inference_steps is 4 there and 5 here", "--num-inference-steps", "5")
    tiny_model(4).save(tmp_path / "other")
    failing(run, "holds another run: model is", model=tmp_path / "other")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["--num-inference-steps", "0"], "--num-inference-steps must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--first-seed", "-1"], "--first-seed must be in [0, 2**32 - --num-images], got -1"),
        (["--first-seed", str(2**32 - 2)], "--first-seed must be in [0, 2**32 - --num-images]"),
        (["--num-inference-steps", "1001"], "num_inference_steps must be in [1, 1000], got 1001"),
        (["--device", "gpu"], "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--model", "nothing"], "model must be an existing folder that Diffusers wrote"),
    ],
)
def test_misuse(run, arguments, message):
    failing(run, message, *arguments)


def test_models_that_draw_no_pictures(run, tmp_path):
    model = tiny_model(in_channels=4, out_channels=4)
    assert isinstance(model.module, UNet2DModel)
    model.save(tmp_path / "latent")
    failing(run, "must draw grey or RGB images, got 4 channels", model=tmp_path / "latent")


def test_control_c(run, monkeypatch):
    from dtrak.training import drawing as command

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "encode_png", interrupt)
        code, output = run()
    assert code == 130
    assert "interrupted: run the same command again" in output
    assert run()[0] == 0


# of SIGKILL the fast lane has the main command, of this the interrupted drawing
@pytest.mark.full
def test_a_killed_run_goes_on(run, tmp_path):
    # slow enough that the killer comes in time
    model = tmp_path / "slow"
    tiny_model(3, scheduler=linear_process().scheduler, layers_per_block=2).save(model)
    output = tmp_path / "drawn"
    options = ["--num-images", "15", "--batch-size", "1", "--num-inference-steps", "30"]
    command = [
        sys.executable, "-m", "dtrak.generate", "--model", str(model), "--output", str(output),
        "--device", "cpu", *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (output / "00001.png").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = drawn(output)
    assert 2 <= len(kept) < 15
    assert run(*options, model=model)[0] == 0
    assert len(drawn(output)) == 15
    assert kept.items() <= drawn(output).items()
    assert run(*options, model=model, output=tmp_path / "whole")[0] == 0
    assert drawn(output) == drawn(tmp_path / "whole")
