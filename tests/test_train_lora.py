"""The command that fine-tunes: what it writes, resumes and refuses."""

import json
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from claims import check_training_alone
from diffusers import StableDiffusionPipeline
from tiny_stable_diffusion import build_pipeline, write_pictures
from typer.testing import CliRunner

from dtrak.cli.train_lora import app
from dtrak.data.images import load_data
from dtrak.models import load
from dtrak.models.lora import hash_lora
from dtrak.training import fine_tuning as lora_fine_tuning
from dtrak.training.fine_tuning import _recipe
from dtrak.training.presets import get_preset
from dtrak.training.train_lora_options import Options

pytestmark = pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def run(folder, pictures, tmp_path):
    def run(*arguments, model=folder, data=pictures, output=tmp_path / "lora"):
        fixed = ["--output", str(output), "--device", "cpu", "--rank", "2", "--steps", "4"]
        fixed += [] if model is None else ["--model", str(model)]
        fixed += [] if data is None else ["--data", str(data)]
        # it remembers the precision of the first run of a process
        AcceleratorState._reset_state(reset_partial_state=True)
        command = [*fixed, "--batch-size", "3", *map(str, arguments)]
        result = CliRunner().invoke(app, command)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_writes_a_lora_that_diffusers_and_dtrak_read(run, folder, tmp_path):
    code, output = run("--keep-checkpoints", "2")
    assert code == 0, output
    # 16 attention layers of this base, two factors of rank 2
    assert "5 images, 1,312 parameters, 4 steps of 3 on 1 x cpu" in output
    model = load(folder, tmp_path / "lora")
    record = json.loads((tmp_path / "lora" / "training.json").read_text())
    assert record["facts"]["trained weights"] == hash_lora(model.module)
    assert record["settings"]["recipe"]["learning_rate"] == 3e-4
    assert record["settings"]["model"]["model"] == model.identity()["model"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(tmp_path / "lora")
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 12)
    with torch.no_grad():
        assert torch.equal(pipeline.unet(*arguments).sample, model.module(*arguments).sample)
    half, last = (
        hash_lora(load(folder, tmp_path / "lora" / f"checkpoint-{step}").module) for step in (2, 4)
    )
    assert last == hash_lora(model.module) != half
    assert not (tmp_path / "lora" / "training.pt").exists()
    code, output = run("--keep-checkpoints", "2")
    assert (code, "already trained" in output) == (0, True)


def test_captions_that_are_cut_are_told_once(run):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, output = run("--caption", "a painting of more letters than the model reads")
    assert code == 0, output
    assert output.count("5 captions have more than 16 tokens and are cut") == 1


def test_an_interrupted_training_resumes_with_the_same_bits(run, folder, tmp_path, monkeypatch):
    from dtrak.training import lora_trainer as lora_training

    assert run(output=tmp_path / "whole")[0] == 0
    take_step = lora_training._LoraTrainer.take_step

    def interrupt(self, posteriors, captions, step, steps):
        if step == 3:
            raise KeyboardInterrupt
        take_step(self, posteriors, captions, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(lora_training._LoraTrainer, "take_step", interrupt)
        code, output = run("--checkpoint-every", "2")
    assert code == 130
    assert "interrupted: run the same command again" in output
    assert (tmp_path / "lora" / "training.pt").is_file()
    # the latents are kept: the VAE is not asked again
    with monkeypatch.context() as patch:
        patch.setattr("dtrak.models.stable_diffusion.StableDiffusion.posterior", None)
        assert run("--checkpoint-every", "2")[0] == 0
    hashes = {hash_lora(load(folder, tmp_path / name).module) for name in ("whole", "lora")}
    assert len(hashes) == 1


def test_without_some_images_and_shared_latents(run, pictures, tmp_path, monkeypatch):
    shared = ["--latents", tmp_path / "latents"]
    assert run(*shared, output=tmp_path / "whole")[0] == 0
    (tmp_path / "ids.txt").write_text("baroque/feast.png\n")
    monkeypatch.setattr("dtrak.models.stable_diffusion.StableDiffusion.posterior", None)
    code, output = run(*shared, "--without", tmp_path / "ids.txt")
    assert code == 0, output
    assert "4 images" in output
    settings = json.loads((tmp_path / "lora" / "training.json").read_text())["settings"]
    assert settings["data"]["without"] == "1 images"
    (tmp_path / "ids.txt").write_text("nothing.png\n")
    failing(run, "got 1 others, such as 'nothing.png'", "--without", tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("\n".join(load_data(pictures).ids))
    failing(run, "must leave at least one image", "--without", tmp_path / "ids.txt")


def failing(run, message, *arguments, **options):
    code, output = run(*arguments, **options)
    assert code == 2, output
    assert "error: " in output
    assert message in output, output


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--rank", 0, "--rank must be at least 1, got 0"),
        ("--steps", 0, "--steps must be at least 1, got 0"),
        ("--batch-size", 0, "--batch-size must be at least 1, got 0"),
        ("--checkpoint-every", 0, "--checkpoint-every must be at least 1, got 0"),
        ("--keep-checkpoints", -1, "--keep-checkpoints must be at least 0, got -1"),
        ("--learning-rate", 0, "--learning-rate must be positive, got 0"),
        ("--caption-dropout", 2, "--caption-dropout must be in [0, 1], got 2"),
        ("--seed", -1, "--seed must be in [0, 2**32), got -1"),
        ("--subset", -1, "--subset must be at least 0, got -1"),
        ("--subset", 1, "--subset needs --preset"),
        ("--epochs", 1, "--epochs and --steps exclude each other"),
        ("--mixed-precision", "fp15", "did you mean 'fp16'?"),
        ("--mixed-precision", "fp16", "--mixed-precision fp16 must run on a GPU, got the CPU"),
        ("--preset", "artbench", "did you mean 'artbench"),
        ("--preset", "cifar2", "must be one that fine-tunes (artbench2, artbench5), got 'cifar2'"),
        ("--resolution", 24, "(--resize resizes and crops)"),
    ],
)
def test_bad_values_give_one_clear_line(option, value, message, run, monkeypatch):
    if option != "--resolution":
        monkeypatch.setattr(
            lora_fine_tuning, "load_data", lambda *_, **__: pytest.fail("data was read")
        )
    failing(run, message, option, value)


def test_another_model_is_refused_before_the_data_is_read(run, tmp_path, monkeypatch):
    assert run()[0] == 0
    record = (tmp_path / "lora" / "training.json").read_bytes()
    other = build_pipeline(tmp_path / "other", seed=1)
    monkeypatch.setattr(
        lora_fine_tuning, "load_data", lambda *_, **__: pytest.fail("data was read")
    )
    failing(run, "holds another run: base is", model=other)
    failing(run, "model.model is", model=other)
    failing(run, "rank is 2 there and 3 here", "--rank", 3)
    assert (tmp_path / "lora" / "training.json").read_bytes() == record


def test_one_command_at_a_time_trains(run, tmp_path):
    check_training_alone(run, failing, tmp_path / "lora")


def test_inputs_that_do_not_go_together(run, folder, pictures, tmp_path):
    failing(run, "--model and --data must be given", model=None)
    failing(run, "--model and --data must be given", data=None)
    bare = write_pictures(tmp_path / "bare", metadata=False)
    failing(run, "must have captions: metadata.jsonl", data=bare)
    code, output = run("--caption", "a {label} painting", data=bare)
    assert code == 0, output
    failing(run, "holds another run: captions is", "--caption", "painting", data=bare)
    # the published data set is another one
    preset = ["--preset", "artbench2"]
    failing(run, "images", *preset, data=pictures, output=tmp_path / "preset")
    failing(run, "are the preset's own", *preset, "--caption", "x", output=tmp_path / "preset")


def test_the_recipe_is_the_published_one():
    for name in (None, "artbench2", "artbench5"):
        recipe = _recipe(Options("x"), None if name is None else get_preset(name))
        assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (100, 64, 3e-4)
        assert (recipe.betas, recipe.weight_decay, recipe.max_grad_norm) == ((0.9, 0.999), 1e-6, 1)
        assert (recipe.dropout, recipe.flip, recipe.seed) == (0.1, True, 42)
        # 79 steps an epoch of 5,000 images, the last batch short
        assert recipe.num_steps(5000) == 7900
    assert _recipe(Options("x", subset=3), get_preset("artbench2")).seed == 0
