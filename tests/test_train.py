"""The training command: what it writes, how it resumes, and every way it can be misused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from claims import check_training_alone
from diffusers import DDPMPipeline
from numerics import relative_error
from typer.testing import CliRunner

from dtrak.cli.train import app
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.models.unet import digits_model
from dtrak.runs.files import LOCK_FILE
from dtrak.runs.workers import one_thread
from dtrak.training.command import checkpoint_steps
from dtrak.training.data import positions_without, read_ids
from dtrak.training.presets import get_preset
from dtrak.training.trainer import Recipe, train

SMALL = ["--steps", "6", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture
def run(tmp_path):
    """Run the command; gives (exit code, everything printed)."""

    def run(*arguments, output=tmp_path / "run", preset="digits", small=SMALL):
        fixed = ["--preset", preset, "--output", str(output), *small]
        result = CliRunner().invoke(app, [*fixed, *map(str, arguments)])
        # accelerators made in one process share their state
        AcceleratorState._reset_state(True)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return run


@pytest.fixture(scope="module")
def digits():
    return get_preset("digits").load_data()


def failing(run, message, *arguments, **options):
    code, output = run(*arguments, **options)
    assert code == 2, output
    assert message in output


def test_trains_what_the_library_trains(run, tmp_path, digits):
    code, output = run("--keep-checkpoints", "3")
    assert code == 0, output
    folder = tmp_path / "run"
    with one_thread():
        expected = train(digits_model(), digits.images, Recipe(steps=6, batch_size=8))
    assert hash_model(load(folder).module) == hash_model(expected.module)
    # and Diffusers reads it
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert hash_model(pipeline.unet) == hash_model(expected.module)
    written = json.loads((folder / "training.json").read_text())
    about = {"fingerprint": digits.fingerprint, "rows": 1000, "preset": "digits"}
    assert written["settings"]["data"] == about
    assert written["settings"]["start"] == {"preset": "digits"}
    assert written["settings"]["recipe"] == Recipe(steps=6, batch_size=8).to_dict()
    assert written["facts"]["trained weights"] == hash_model(expected.module)
    assert sorted(path.name for path in folder.iterdir()) == [
        LOCK_FILE,
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "model_index.json",
        "scheduler",
        "training.json",
        "unet",
    ]
    kept = {step: load(folder / f"checkpoint-{step}") for step in (2, 4, 6)}
    assert hash_model(kept[6].module) == hash_model(expected.module)
    # a model on the way is not one of a shorter training: its learning rates differ
    on_the_way = {}
    with one_thread():
        model = digits_model()
        train(
            model,
            digits.images,
            Recipe(steps=6, batch_size=8),
            progress=lambda done, total: on_the_way.update({done: hash_model(model.module)}),
        )
    assert {step: hash_model(kept[step].module) for step in kept} == {
        step: on_the_way[step] for step in (2, 4, 6)
    }
    assert kept[2].process.describe() == load(folder).process.describe()

    code, output = run("--keep-checkpoints", "3")
    assert code == 0
    assert "already trained" in output
    failing(run, "holds another run: kept checkpoints is [2, 4, 6] there and [] here")
    failing(run, "recipe.seed is 0 there and 1 here", "--seed", "1", "--keep-checkpoints", "3")


def test_checkpoint_steps_are_those_of_tracin():
    assert checkpoint_steps(8000, 4) == [2000, 4000, 6000, 8000]
    assert checkpoint_steps(78200, 4) == [19550, 39100, 58650, 78200]
    assert checkpoint_steps(7900, 4) == [1975, 3950, 5925, 7900]
    assert checkpoint_steps(3, 5) == [1, 2, 3]
    assert checkpoint_steps(100, 0) == []


def test_subsets_and_their_seeds(run, tmp_path, digits):
    code, output = run("--subset", "3")
    assert code == 0, output
    assert "500 images" in output
    mask = get_preset("digits").subsets(digits, 4)[3]
    recipe = Recipe(steps=6, batch_size=8)
    with one_thread():
        expected = train(digits_model(), digits.images[mask], recipe)
    assert hash_model(load(tmp_path / "run").module) == hash_model(expected.module)
    written = json.loads((tmp_path / "run" / "training.json").read_text())["settings"]
    assert written["data"]["subset"] == 3
    assert written["data"]["fingerprint"] == digits.select(mask).fingerprint
    failing(run, "data.family is \"lds-val\" there and \"retrain\"", "--subset", "3", "--family",
            "retrain")  # fmt: skip


def test_seed_is_that_of_the_weights_too(run, tmp_path, digits):
    assert run("--seed", "5")[0] == 0
    with one_thread():
        expected = train(digits_model(5), digits.images, Recipe(steps=6, batch_size=8, seed=5))
    assert hash_model(load(tmp_path / "run").module) == hash_model(expected.module)


def test_without_some_images(run, tmp_path, digits):
    removed = [digits.ids[position] for position in (0, 7, 999)]
    (tmp_path / "ids.txt").write_text("\n".join([removed[2], "", f"  {removed[0]}", removed[1]]))
    code, output = run("--without", tmp_path / "ids.txt")
    assert code == 0, output
    assert "997 images" in output
    kept = [position for position in range(1000) if position not in (0, 7, 999)]
    written = json.loads((tmp_path / "run" / "training.json").read_text())["settings"]
    assert written["data"]["fingerprint"] == digits.select(kept).fingerprint
    assert written["data"]["without"] == [removed[2], removed[0], removed[1]]
    (tmp_path / "ids.txt").write_text("digits/9999\n")
    message = "ids must be of the training images, got 1 others, such as 'digits/9999'; theirs are"
    failing(run, message, "--without", tmp_path / "ids.txt", output=tmp_path / "b")
    # a name may be no UTF-8
    (tmp_path / "ids.txt").write_bytes(b"\xff.png")
    failing(run, r"others, such as '\udcff.png'", "--without", tmp_path / "ids.txt")
    failing(run, "no file of ids at", "--without", tmp_path / "nothing.txt")


def test_selecting_nothing(digits):
    few = digits.select([0, 1])
    with pytest.raises(ValueError, match="ids must leave at least one image, got all 2"):
        positions_without(few, few.ids)
    assert positions_without(few, []) == [0, 1]


def test_ids(tmp_path):
    (tmp_path / "ids.txt").write_text("ä/1.png\r\n\n b c.png \n", encoding="utf-8")
    assert read_ids(tmp_path / "ids.txt") == ["ä/1.png", "b c.png"]


def test_averaged_and_mixed(run, tmp_path):
    assert run("--ema", "0.9", "--mixed-precision", "bf16", output=tmp_path / "a")[0] == 0
    assert run(output=tmp_path / "b")[0] == 0
    settings = json.loads((tmp_path / "a" / "training.json").read_text())["settings"]
    assert (settings["recipe"]["ema_decay"], settings["mixed_precision"]) == (0.9, "bf16")
    one, other = (load(tmp_path / name) for name in "ab")
    assert one.module.dtype == torch.float32
    assert hash_model(one.module) != hash_model(other.module)
    failing(run, 'mixed_precision is "bf16" there and "no"', "--ema", "0.9", output=tmp_path / "a")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        (["--keep-checkpoints", "-1"], "--keep-checkpoints must be at least 0, got -1"),
        (["--ema", "1"], "--ema must be in [0, 1), got 1.0"),
        (["--seed", "-1"], "--seed must be in [0, 2**32), got -1"),
        (["--subset", "-1"], "--subset must be at least 0, got -1"),
        (["--subset", "1", "--without", "x"], "--subset and --without exclude each other"),
        (["--family", "lds"], "--family must be one of lds-val, lds-test, retrain, got 'lds'"),
        (["--mixed-precision", "fp8"], "--mixed-precision must be one of no, fp16, bf16, got"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16 must run on a GPU, got the CPU"),
        (["--device", "gpu"], "--device must be one of auto, cpu, got 'gpu'"),
        (["--preset", "cifar"], "did you mean 'cifar"),
        (
            ["--schedule", "cosin"],
            "--schedule must be one of cosine, linear, constant",
        ),
        (
            ["--lora-rank", "2"],
            "--lora-rank is not for --preset digits",
        ),
        (["--caption-dropout", "0.1"], "caption_dropout must be 0 for a model that reads no"),
        (["--preset", "celeba"], "the data of 'celeba' must be given (--data)"),
        (["--preset", "cifar2", "--data", "./nothing"], "no file or folder at './nothing'"),
    ],
)
def test_misuse(run, tmp_path, arguments, message):
    failing(run, message, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_training_that_fails_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dtrak.training.command.train", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_control_c_and_a_damaged_state(run, tmp_path, monkeypatch):
    from dtrak.training import trainer as training

    real = training.batch_indices

    def interrupt(step, size, recipe):
        if step == 3:
            raise KeyboardInterrupt
        return real(step, size, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_indices", interrupt)
        code, output = run("--checkpoint-every", "2")
    assert code == 130
    assert "interrupted: run the same command again, it resumes where it stopped" in output
    state = tmp_path / "run" / "training.pt"
    content = state.read_bytes()
    state.write_bytes(content[:-100])
    failing(run, "training.pt is damaged", "--checkpoint-every", "2")
    state.write_bytes(content)
    code, output = run("--checkpoint-every", "2")
    assert code == 0, output
    assert run(output=tmp_path / "whole")[0] == 0
    one, other = (load(tmp_path / name) for name in ("run", "whole"))
    assert hash_model(one.module) == hash_model(other.module)
    assert not state.exists()


# of SIGKILL the fast lane has the main command, of this the interrupted training
@pytest.mark.full
def test_killed_runs_resume_with_the_same_bits(run, tmp_path):
    """kill -9 while it trains, then the same command again; everything published is switched on."""
    options = ["--checkpoint-every", "5", "--ema", "0.9", "--keep-checkpoints", "2"]
    small = ["--steps", "60", "--batch-size", "4", "--device", "cpu"]
    broken = tmp_path / "broken"
    command = [
        sys.executable, "-m", "dtrak.train", "--preset", "digits", "--output", str(broken),
        *small, *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    state = broken / "training.pt"
    deadline = time.monotonic() + 240
    while not state.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.is_file()
    assert not (broken / "model_index.json").exists()
    # it had not come far
    reached = torch.load(state, weights_only=True)["step"]
    assert 5 <= reached < 60
    code, output = run(*options, output=broken, small=small)
    assert code == 0, output
    assert run(*options, output=tmp_path / "whole", small=small)[0] == 0
    for name in (".", "checkpoint-30", "checkpoint-60"):
        one, other = (load(tmp_path / f / name) for f in ("broken", "whole"))
        assert hash_model(one.module) == hash_model(other.module)
    assert not list(broken.rglob("*.partial"))


def test_a_killed_save_is_no_model(run, tmp_path, monkeypatch):
    """Killed between the parts of the pipeline: the same command finishes it."""
    from pathlib import Path

    replace = Path.replace

    def stop(self, target):
        if self.name == "model_index.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        assert run()[0] == 130
    folder = tmp_path / "run"
    assert (folder / "unet").is_dir()
    assert not (folder / "model_index.json").exists()
    assert run()[0] == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        LOCK_FILE,
        "model_index.json",
        "scheduler",
        "training.json",
        "unet",
    ]
    assert run(output=tmp_path / "whole")[0] == 0
    one, other = (load(tmp_path / name) for name in ("run", "whole"))
    assert hash_model(one.module) == hash_model(other.module)


def test_one_command_at_a_time_trains(run, tmp_path):
    check_training_alone(run, failing, tmp_path / "run")


# slow: a launcher and two processes
@pytest.mark.full
def test_two_processes_train_what_one_trains(run, tmp_path):
    arguments = ["--preset", "digits", "--steps", "6", "--batch-size", "9", "--device", "cpu"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "dtrak.train", "--output", str(tmp_path / "two"), *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "training.json").read_text())["facts"]["processes"] == 2
    # only one of them writes and speaks
    assert done.stderr.count("model: ") == 1
    assert run(output=tmp_path / "one", small=arguments[2:])[0] == 0
    start, one, two = (
        torch.cat([p.detach().flatten() for p in model.module.parameters()])
        for model in (digits_model(), *(load(tmp_path / n) for n in ("one", "two")))
    )
    assert relative_error(two - start, one - start) < 1e-3


@pytest.mark.gpu
def test_half_precision_on_a_gpu(run, tmp_path):
    small = ["--steps", "20", "--batch-size", "8"]
    for precision in ("no", "fp16", "bf16"):
        folder = tmp_path / precision
        code, output = run("--mixed-precision", precision, output=folder, small=small)
        assert code == 0, output
    start, full, half, brain = (
        torch.cat([p.detach().flatten().cpu() for p in model.module.parameters()])
        for model in (
            digits_model(),
            *(load(tmp_path / name) for name in ("no", "fp16", "bf16")),
        )
    )
    assert 1e-6 < relative_error(half - start, full - start) < 0.5
    assert 1e-6 < relative_error(brain - start, full - start) < 0.5
