"""What people type and have: paths from home, terminals without Unicode, names, sizes, captions."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from finished_run import results
from PIL import Image
from tiny import tiny_model, tiny_unet
from typer.testing import CliRunner

import dtrak
from dtrak.cli.attribute import app
from dtrak.cli.generate import app as generate
from dtrak.cli.train import app as train
from dtrak.data.captions import caption_all, read_captions, read_prompts
from dtrak.data.images import DataError, load_data
from dtrak.evaluation.subject import find_trained
from dtrak.models.hashing import hash_model
from dtrak.runs.folders import OutputError, refuse_inside
from dtrak.runs.options import Options
from dtrak.runs.run import make_plan
from dtrak.training.options import Options as TrainOptions

COMMANDS = ["attribute", "counterfactual", "ensemble", "generate", "lds", "report", "train"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a model and images, away from the working directory."""
    place = tmp_path / "home"
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(place / "pipe")
    put(place / "data", "a.png", "b.png", "c.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(place))
    return place


def put(folder, *names, size=8):
    folder.mkdir(parents=True, exist_ok=True)
    for level, name in enumerate(names):
        Image.new("L", (size, size), 40 * level).save(folder / name)
    return folder


def call(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def attribute(*arguments):
    return call(app, "--timesteps", 2, "--proj-dim", 256, *arguments)


def test_paths_are_from_home_wherever_one_is_given(home):
    done = attribute(
        "--model", "~/pipe/", "--data", "~/data", "--queries", "~/data/a.png", "--output", "~/run"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "training images: 3 images of" in done.output
    assert results(home / "run")
    assert call(generate, "--model", "~/pipe", "--output", "~/drawn", "--num-images", 1,
                "--num-inference-steps", 1).exit_code == 0  # fmt: skip
    assert (home / "drawn" / "00000.png").is_file()
    dtrak.explain("~/pipe", "~/data", "~/data/a.png", store="~/store", timesteps=2, progress=False)
    assert (home / "store").is_dir()
    found = dtrak.Attribution.open("~/run")
    found.to_csv("~/scores.csv")
    found.save("~/saved")
    assert dtrak.Attribution.open("~/saved").ids == ["a.png", "b.png", "c.png"]
    # nothing of all that is in the working directory
    assert not list((home.parent / "work").iterdir())


def test_an_output_in_the_data_is_refused_however_it_is_called(home):
    (home / "link").symlink_to(home / "data")
    for output in ("~/data", "~/data/x/", "~/link/x", home / "data" / "x" / ".." / "y"):
        done = attribute("--model", "~/pipe", "--data", "~/data", "--output", output)
        assert done.exit_code == 2
        assert "must not lie in the folder of --data" in " ".join(done.output.split())
        config = home / "pipe" / "unet" / "config.json"
        done = call(train, "--config", config, "--data", "~/link", "--output", output)
        assert done.exit_code == 2
        assert "must not lie in the folder of --data" in " ".join(done.output.split())
    assert sorted(os.listdir(home / "data")) == ["a.png", "b.png", "c.png"]
    with pytest.raises(OutputError, match="in the folder of --validation"):
        refuse_inside(home / "data", data="digits", validation="~/data")
    refuse_inside(home / "data-2", data="~/data", queries="generated", validation=None)


def test_options_are_normalised_when_they_are_made(home):
    options = Options(data="~/data", queries="~/data", prompts="~ a tilde in a prompt")
    assert options.data == options.queries == str(home / "data")
    assert options.prompts == "~ a tilde in a prompt"
    assert TrainOptions(output="~/x", data="owner/name").data == "owner/name"
    assert Options(data="$HOME/data").data == "$HOME/data"
    with pytest.raises(ValueError, match="must be of a user's home folder, got '~nobody-here/x'"):
        Options(output="~nobody-here/x")
    assert make_plan(Options(data="..", model="~/pipe")).output.name == "pipe"
    assert make_plan(Options(data=".")).output.name == "work"
    (home / "prompts.txt").write_text("a\nb\n")
    assert read_prompts("~/prompts.txt") == ["a", "b"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_on_terminals_without_unicode(encoding):
    program = f"""
import importlib, io, sys
for name in {COMMANDS}:
    for command in ([], ["prepare"], ["evaluate"]) if name == "lds" else ([],):
        try:
            importlib.import_module("dtrak." + name).main([*command, "--help"])
        except SystemExit as end:
            assert end.code == 0
from dtrak.runs.console import Console, progress_bar
console = Console(force_terminal=True)
with progress_bar(console, "caf\\u00e9 \\u03bb \\udce9") as progress:
    progress(1, 2)
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    text = done.stdout.decode(encoding)
    assert text.count("Usage: ") == len(COMMANDS) + 2
    assert "lambda in units of the Gram matrix Phi^TPhi" in " ".join(text.split())
    assert "lambda \\udce9" in text


@pytest.mark.pictures
def test_a_file_name_that_is_no_text_goes_through_a_run(home):
    os.rename(home / "data" / "a.png", os.fsencode(home) + b"/data/caf\xe9.png")
    output = home / "run"
    done = attribute(
        "--model", "~/pipe", "--data", "~/data", "--queries", "~/data", "--output", output
    )
    assert done.exit_code == 0, done.output
    assert r"caf\udce9.png" in (results(output) / "report.html").read_text(encoding="utf-8")
    found = dtrak.Attribution.open(output)
    assert "caf\udce9.png" in found.ids
    assert b"caf\xe9.png" in found.to_csv(home / "scores.csv").read_bytes()
    # safetensors opens no such path: what is ours has another name, what is not is refused
    query = home / "data" / "caf\udce9.png"
    assert call(app, "--run", output, "--queries", query).exit_code == 0
    assert len(dtrak.Attribution.open(output, queries="caf_").scores) == 1
    done = attribute("--model", "~/pipe", "--data", "~/data", "--output", home / "out\udce9")
    assert done.exit_code == 2
    assert "the path of --output must be UTF-8" in done.output
    shutil.copytree(home / "pipe", home / "pipe\udce9")
    with pytest.raises(ValueError, match="the path of model must be UTF-8"):
        dtrak.load(home / "pipe\udce9")


def test_captions_that_no_tokenizer_reads(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "\ud83d"}))
    data = load_data(tmp_path)
    with pytest.raises(DataError, match=r"of 'a\.png' must be text in Unicode, got '\\ud83d"):
        read_captions(str(tmp_path), data)
    with pytest.raises(DataError, match="'--prompts' must be text in Unicode"):
        read_prompts("caf\udce9")
    with pytest.raises(DataError, match="must be text in Unicode"):
        dtrak.images([Image.new("L", (8, 8))], captions=["\udce9"])
    put(tmp_path / "x" / "caf\udce9", "a.png")
    put(tmp_path / "x" / "dog", "b.png")
    with pytest.raises(DataError, match="must be text in Unicode"):
        caption_all("a {label}", str(tmp_path / "x"), load_data(tmp_path / "x"))


@pytest.mark.parametrize("size", [9, 17])
def test_sizes_that_a_network_does_not_halve(tmp_path, size):
    blocks = {"block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2}
    unet = tiny_unet(sample_size=size, up_block_types=("UpBlock2D",) * 2, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    data = put(tmp_path / "data", "a.png", size=size)
    said = f"sides that are multiples of 2, as the U-Net halves them, got {size}x{size} pixels"
    done = attribute(
        "--model", tmp_path / "pipe", "--data", data, "--queries", data, "--output", tmp_path / "o"
    )
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "o").exists()
    done = call(generate, "--model", tmp_path / "pipe", "--output", tmp_path / "p")
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    with pytest.raises(ValueError, match="multiples of 2"):
        dtrak.explain(tmp_path / "pipe", data, data, progress=False)
    tiny_model().input_shape((1, 9, 9))
    assert torch.isfinite(load_data(data).images).all()


# slow: a training; test_places.py finds the average
@pytest.mark.full
def test_the_moving_average_of_a_checkpoint_is_explained(home):
    tiny_unet(2).save_pretrained(home / "pipe" / "unet_ema")
    common = ("--model", "~/pipe", "--data", "~/data", "--queries", "~/data")
    done = attribute(*common, "--output", "~/a")
    assert "--weights ema takes the moving average" in " ".join(done.output.split())
    done = attribute(*common, "--weights", "ema", "--output", "~/b")
    assert done.exit_code == 0, done.output
    one, two = (dtrak.Attribution.open(home / name).scores for name in "ab")
    assert not torch.equal(one, two)
    done = attribute(*common, "--weights", "ema", "--output", "~/a")
    assert done.exit_code == 2
    assert "holds another run: model" in " ".join(done.output.split())
    # an experiment is on the model that was explained
    recipe = home / "recipe.json"
    recipe.write_text(json.dumps({"recipe": {"steps": 1}, "start": {"model": str(home / "pipe")}}))
    trained = find_trained(home / "b", recipe=recipe)
    assert hash_model(trained.load().module) == hash_model(tiny_unet(2))
    done = call(app, "--run", home / "b", "--weights", "trained")
    assert done.exit_code == 2
    again = call(app, "--run", home / "b", "--queries", "~/data/a.png")
    assert again.exit_code == 0, again.output
